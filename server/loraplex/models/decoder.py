"""The pre-norm decoder that every family here is an instance of: embedding, layers, last norm, head."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import torch

from loraplex.layers.attention import Attention, LayerStep
from loraplex.layers.embedding import Embedding, Head
from loraplex.layers.linear import Linear
from loraplex.layers.mlp import GatedMLP
from loraplex.layers.norm import RMSNorm
from loraplex.layers.rotary import Rotary
from loraplex.layers.rows_memory import RowsMemory
from loraplex.models.base import ForwardBatch, KVSpec, TableRef
from loraplex.models.sites import Site
from loraplex.models.spec import DecoderSpec
from loraplex.quant.base import Placement
from loraplex_kernels.lora import StepPlan
from loraplex_kernels.segments import SegmentPlan
from loraplex_kernels.states import StateShape


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """``x += attention(norm(x)); x += mlp(norm(x))``, and the linears it is made of."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP
    linears: tuple[Linear, ...]
    qk_norms: tuple[RMSNorm, ...]

    @property
    def norms(self) -> tuple[RMSNorm, ...]:
        return (self.attention_norm, self.mlp_norm, *self.qk_norms)

    def add_(self, x: torch.Tensor, step: LayerStep) -> torch.Tensor:
        """One layer on the residual stream ``[T, H]``, in place."""
        x += self.attention(self.attention_norm(x, step.adapters), step)
        x += self.mlp(self.mlp_norm(x, step.adapters), step.adapters)
        return x


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """Everything a decoder owns. ``weight_bytes`` counts each stored form of a matrix once."""

    embedding: Embedding
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    head: Head
    rotary: Rotary
    kv_heads: int
    weight_bytes: int
    own_rows: RowsMemory


class Decoder:
    """A loaded base model of one rank (``models.base.BaseModel``)."""

    def __init__(self, spec: DecoderSpec, placement: Placement, parts: DecoderParts) -> None:
        self._spec = spec
        self._parts = parts
        self.architecture = spec.architecture
        self.vocab_size = spec.vocab_size
        self.max_position = spec.max_position
        self.hidden_size = spec.hidden_size
        self.tied = spec.tied
        self.aliases = spec.aliases
        self.dtype = placement.dtype
        self.device = placement.device
        self.weight_bytes = parts.weight_bytes

    def sites(self) -> tuple[Site, ...]:
        return self._spec.sites()

    def tables(self) -> dict[str, TableRef]:
        embedding, head = self._parts.embedding, self._parts.head
        refs = {embedding.site: TableRef(embedding.table, 0, embedding.rows)}
        refs.update(_linear_refs(linear for layer in self._parts.layers for linear in layer.linears))
        refs.update({norm.site: TableRef(None, 0, norm.rows) for norm in self._norms()})
        refs[head.site] = TableRef(head.table, 0, head.rows)
        return {site.name: refs[site.name] for site in self.sites()}

    def dense_weight(self, site: str) -> torch.Tensor:
        """The base's weight at ``site``, dense: ``[out, in]``; an embedding's ``[vocab, hidden]``, a norm's ``[n]``.
        Read-only."""
        if site == self._parts.embedding.site or (site == self._parts.head.site and self._spec.tied):
            return self._parts.embedding.weight.dequantize()
        if site == self._parts.head.site:
            return self._parts.head.weight.dequantize()
        norm = next((norm for norm in self._norms() if norm.site == site), None)
        if norm is not None:
            return norm.weight
        linear, part = self._linear(site)
        return torch.split(linear.weight.dequantize(), list(linear.table.part_sizes))[part]

    def dense_bias(self, site: str) -> torch.Tensor | None:
        """The base's bias at ``site``, ``[out]``; None where it has none. Read-only."""
        if all(site not in one.sites for layer in self._parts.layers for one in layer.linears):
            return None
        linear, part = self._linear(site)
        return None if linear.bias is None else torch.split(linear.bias, list(linear.table.part_sizes))[part]

    def has_own_rows(self, plan: SegmentPlan) -> bool:
        """Whether an adapter of the plan has rows of its own at any site: such a step is launched kernel by kernel."""
        return bool(self._parts.own_rows.slots and self._parts.own_rows.owners(plan))

    def state_shape(self) -> StateShape | None:
        """It has no state-space layers."""
        return None

    def kv_spec(self) -> KVSpec:
        return KVSpec(self._spec.num_layers, self._parts.kv_heads, self._spec.head_dim)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Hidden states after the last norm, ``[T, H]``."""
        parts = self._parts
        x = parts.embedding(batch.token_ids, batch.adapters)
        step = LayerStep(batch.adapters, parts.rotary(batch.positions), batch.attention, batch.kv_cache)
        for layer in parts.layers:
            x = layer.add_(x, step)
        return parts.norm(x, batch.adapters)

    def forward_in_pieces(self, batch: ForwardBatch) -> Generator[None, None, torch.Tensor]:
        """``forward``, with a pause after each layer."""
        parts = self._parts
        x = parts.embedding(batch.token_ids, batch.adapters)
        step = LayerStep(batch.adapters, parts.rotary(batch.positions), batch.attention, batch.kv_cache)
        for layer in parts.layers:
            x = layer.add_(x, step)
            yield
        return parts.norm(x, batch.adapters)

    def head(self, hidden: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        """Logits ``[S, V]`` in float32 of rows ``[S, H]``; wider where an adapter of the rows adds vocabulary."""
        return self._parts.head(hidden, adapters)

    def _norms(self) -> Iterator[RMSNorm]:
        for layer in self._parts.layers:
            yield from layer.norms
        yield self._parts.norm

    def _linear(self, site: str) -> tuple[Linear, int]:
        """The packed layer that a linear site is a part of, and which."""
        linear = next(one for layer in self._parts.layers for one in layer.linears if site in one.sites)
        return linear, linear.sites.index(site)


def _linear_refs(linears: Iterable[Linear]) -> Iterator[tuple[str, TableRef]]:
    for linear in linears:
        for part, site in enumerate(linear.sites):
            yield site, TableRef(linear.table, part, linear.rows[part])
