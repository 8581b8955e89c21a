"""A decoder described by numbers and parts, without any weight: what a family file makes of config.json.

From a DecoderSpec follow the adaptable sites and every tensor a checkpoint must hold, with its shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from loraplex.errors import InvalidModel, UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.layers.mlp import ACTIVATIONS
from loraplex.layers.rotary import RotarySpec
from loraplex.models.rope_config import rotary_spec
from loraplex.models.sites import EMBEDDING, OUTPUT_HEAD, Alias, Site, SiteKind
from loraplex.parallel.shard import Cut, Shard
from loraplex.quant.base import Matrix

EMBED = f"model.{EMBEDDING}"
HEAD = OUTPUT_HEAD
FINAL_NORM = "model.norm"


@dataclass(frozen=True, slots=True)
class FamilyParts:
    """What a family adds to the plain skeleton. ``windows`` has one entry a layer; None there is full attention."""

    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    default_head_dim: int | None = None


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear module of a layer: its name below the layer, its sizes, whether it has a bias, how ranks share it."""

    name: str  # self_attn.q_proj
    out_features: int
    in_features: int
    bias: bool
    cut: Cut


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A pre-norm decoder with rotary, grouped-query attention and a gated feed-forward block."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    activation: str
    tied: bool
    rotary: RotarySpec
    parts: FamilyParts
    #: other names under which adapters may know its modules
    aliases: tuple[Alias, ...] = ()

    def linears(self) -> tuple[LinearShape, ...]:
        """The linear modules of any one layer, in checkpoint order."""
        parts, hidden, width = self.parts, self.hidden_size, self.intermediate_size
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q_cut = Cut(Shard.COLUMN, self.heads, "num_attention_heads")
        kv_cut = Cut(Shard.COLUMN, self.kv_heads, "num_key_value_heads", shared=True)
        up_cut = Cut(Shard.COLUMN, width, "intermediate_size")
        return (
            LinearShape("self_attn.q_proj", q_size, hidden, parts.qkv_bias, q_cut),
            LinearShape("self_attn.k_proj", kv_size, hidden, parts.qkv_bias, kv_cut),
            LinearShape("self_attn.v_proj", kv_size, hidden, parts.qkv_bias, kv_cut),
            LinearShape("self_attn.o_proj", hidden, q_size, parts.o_bias, replace(q_cut, shard=Shard.ROW)),
            LinearShape("mlp.gate_proj", width, hidden, parts.mlp_bias, up_cut),
            LinearShape("mlp.up_proj", width, hidden, parts.mlp_bias, up_cut),
            LinearShape("mlp.down_proj", hidden, width, parts.mlp_bias, replace(up_cut, shard=Shard.ROW)),
        )

    def sites(self) -> tuple[Site, ...]:
        """Every adaptable module. A tied head is a site of its own: adapters may target it apart."""
        by_tokens = Cut(Shard.ROW, self.vocab_size, "vocab_size")
        embed = Site(EMBED, SiteKind.EMBEDDING, self.vocab_size, self.hidden_size, cut=by_tokens)
        head = Site(
            HEAD, SiteKind.LINEAR, self.hidden_size, self.vocab_size, cut=replace(by_tokens, shard=Shard.COLUMN)
        )
        layers = (site for index in range(self.num_layers) for site in self._layer_sites(layer_name(index)))
        return (embed, *layers, _norm(FINAL_NORM, self.hidden_size), head)

    def norms(self) -> dict[str, int]:
        """The norms of any one layer: name below the layer -> length of the weight, in checkpoint order."""
        norms = {"input_layernorm": self.hidden_size, "post_attention_layernorm": self.hidden_size}
        if self.parts.qk_norm:
            norms.update({"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim})
        return norms

    def _layer_sites(self, layer: str) -> Iterator[Site]:
        for linear in self.linears():
            sizes = linear.in_features, linear.out_features
            yield Site(f"{layer}.{linear.name}", SiteKind.LINEAR, *sizes, linear.bias, linear.cut)
        for name, size in self.norms().items():
            yield _norm(f"{layer}.{name}", size)

    def matrices(self) -> dict[str, Matrix]:
        """Every matrix the checkpoint must hold, by its module's name, in checkpoint order; a tied head has none."""
        ends = {EMBED: Matrix(EMBED, self.vocab_size, self.hidden_size, end=True)}
        head = {HEAD: Matrix(HEAD, self.vocab_size, self.hidden_size, end=True)}
        names = (layer_name(index) for index in range(self.num_layers))
        matrices = (
            Matrix(f"{layer}.{linear.name}", linear.out_features, linear.in_features, bias=linear.bias)
            for layer in names
            for linear in self.linears()
        )
        return ends | {matrix.name: matrix for matrix in matrices} | ({} if self.tied else head)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor a dense checkpoint must hold -> its shape."""
        hidden = (self.hidden_size,)
        shapes: dict[str, tuple[int, ...]] = {f"{EMBED}.weight": (self.vocab_size, self.hidden_size)}
        for index in range(self.num_layers):
            layer = layer_name(index)
            for norm, size in self.norms().items():
                shapes[f"{layer}.{norm}.weight"] = (size,)
            for linear in self.linears():
                shapes[f"{layer}.{linear.name}.weight"] = (linear.out_features, linear.in_features)
                if linear.bias:
                    shapes[f"{layer}.{linear.name}.bias"] = (linear.out_features,)
        shapes[f"{FINAL_NORM}.weight"] = hidden
        if not self.tied:
            shapes[f"{HEAD}.weight"] = (self.vocab_size, self.hidden_size)
        return shapes


def _norm(name: str, size: int) -> Site:
    return Site(name, SiteKind.NORM, size, size)


def layer_name(index: int) -> str:
    """Checkpoint name of one decoder layer."""
    return f"model.layers.{index}"


def decoder_spec(architecture: str, config: ConfigFields, parts: FamilyParts) -> DecoderSpec:
    """Read what all families share.

    Raises InvalidModel naming key and value for a missing or contradictory dimension, UnsupportedFeature for an
    activation or rope scaling we do not have.
    """
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        config.refuse("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    if not config.has("head_dim") and parts.default_head_dim is None and hidden % heads:
        config.refuse("hidden_size", f"a multiple of num_attention_heads = {heads}, as there is no head_dim")
    head_dim = config.integer("head_dim", parts.default_head_dim or hidden // heads)
    if head_dim % 2:
        raise InvalidModel(f"config.json: head_dim is {head_dim}, rotary embedding needs an even one", field="head_dim")
    activation = config.text("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UnsupportedFeature(f"hidden_act {activation!r}; supported are {', '.join(ACTIVATIONS)}")
    max_position = config.integer("max_position_embeddings")
    return DecoderSpec(
        architecture=architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        activation=activation,
        tied=config.flag("tie_word_embeddings", False),
        rotary=rotary_spec(config, head_dim, max_position),
        parts=parts,
    )


def full_attention(config: ConfigFields) -> tuple[int | None, ...]:
    """No window in any layer."""
    return (None,) * config.integer("num_hidden_layers")


def qwen_windows(config: ConfigFields) -> tuple[int | None, ...]:
    """Qwen's rule: ``layer_types`` where given, else layers from ``max_window_layers`` on slide."""
    num_layers = config.integer("num_hidden_layers")
    full = config.declares("sliding_window") and not config.has("sliding_window")
    slides = config.flag("use_sliding_window", False) and not full
    window = config.integer("sliding_window", 4096) if slides else None
    types = config.texts("layer_types")
    if not types:
        first = config.integer("max_window_layers", 28, minimum=0)
        return tuple(window if index >= first else None for index in range(num_layers))
    if len(types) != num_layers:
        config.refuse("layer_types", f"one entry for each of num_hidden_layers = {num_layers}")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedFeature(f"layer_types has {kind!r}; supported are full_attention, sliding_attention")
    if window is None and "sliding_attention" in types:
        config.refuse("layer_types", "no sliding_attention, as use_sliding_window is off or sliding_window missing")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
