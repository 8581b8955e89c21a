"""Self-attention over the paged cache: grouped queries, with what families add to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from loraplex.layers.attention import Attention, AttentionParts, AttentionScales, Heads
from loraplex.layers.norm import HeadNorm
from loraplex.models.mixers.base import BuiltMixer, Held, HeldLinear, HeldSmall, norm_site
from loraplex.models.sites import Site, SiteKind
from loraplex.parallel.shard import Cut, Shard

if TYPE_CHECKING:
    from loraplex.models.workbench import Workbench


PLAIN: Final = AttentionScales()


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """``name`` is the module's below its layer: self_attn. ``window`` None: every position before is seen.

    ``rotates``: queries and keys are rotated as the model says. ``norm_eps``: of the norms on heads, where there are.
    """

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    name: str = "self_attn"
    window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    norm_eps: float | None = None
    rotates: bool = True
    scales: AttentionScales = PLAIN

    def sites(self) -> tuple[Site, ...]:
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q_cut = Cut(Shard.COLUMN, self.heads, "num_attention_heads")
        kv_cut = Cut(Shard.COLUMN, self.kv_heads, "num_key_value_heads", shared=True)
        linears = (
            self._linear("q_proj", self.hidden_size, q_size, self.qkv_bias, q_cut),
            self._linear("k_proj", self.hidden_size, kv_size, self.qkv_bias, kv_cut),
            self._linear("v_proj", self.hidden_size, kv_size, self.qkv_bias, kv_cut),
            self._linear("o_proj", q_size, self.hidden_size, self.o_bias, replace(q_cut, shard=Shard.ROW)),
        )
        if self.norm_eps is None:
            return linears
        return (*linears, *(norm_site(f"{self.name}.{part}_norm", self.head_dim) for part in "qk"))

    def build(self, bench: Workbench, layer: str) -> BuiltMixer:
        name = f"{layer}.{self.name}"
        qkv = bench.linear(*(f"{name}.{part}_proj" for part in "qkv"))
        o = bench.linear(f"{name}.o_proj")
        held: tuple[Held, ...] = (HeldLinear(qkv), HeldLinear(o))
        heads, kv_heads = (bench.num_rows(f"{name}.{part}_proj") // self.head_dim for part in "qk")
        qk_norm = None
        if self.norm_eps is not None:
            norms = tuple(bench.norm(f"{name}.{part}_norm", self.norm_eps) for part in "qk")
            qk_norm = HeadNorm(norms[0], norms[1], (heads, kv_heads), self.norm_eps)
            held += tuple(map(HeldSmall, norms))
        where = Heads(bench.next_kv_layer(), heads, kv_heads, self.head_dim, self.window)
        parts = AttentionParts(qkv, qk_norm, o, bench.runtime.attention)
        return BuiltMixer(Attention(where, parts, self.scales, rotates=self.rotates), held)

    def _linear(self, part: str, in_features: int, out_features: int, bias: bool, cut: Cut) -> Site:
        return Site(f"{self.name}.{part}", SiteKind.LINEAR, in_features, out_features, bias, cut)
