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
from loraplex.models.base import KVSpec
from loraplex.models.mixers.attention import AttentionSpec
from loraplex.models.mixers.base import MixerSpec, below, norm_site
from loraplex.models.mixers.mamba import MambaSpec
from loraplex.models.mixers.mlp import MlpSpec
from loraplex.models.rope_config import rotary_spec
from loraplex.models.sites import EMBEDDING, OUTPUT_HEAD, Site, SiteKind
from loraplex.parallel.shard import Cut, Shard
from loraplex.quant.base import Matrix
from loraplex_kernels.states import StateShape


@dataclass(frozen=True, slots=True)
class Names:
    """What a checkpoint calls the modules outside its layers, and the list of these. ``aliases``: beginnings of names
    as others spell them, each with its own: checkpoints and adapters may use either."""

    embed: str = f"model.{EMBEDDING}"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = OUTPUT_HEAD
    aliases: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """``x += scale * (the sum of the mixers of norm(x))``; ``norm`` is a module below the layer."""

    norm: str
    mixers: tuple[MixerSpec, ...]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Factors:
    """Constants that a family multiplies by: the embedding's rows, and the logits."""

    embedding: float = 1.0
    logits: float = 1.0


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A pre-norm decoder: embedding, layers of blocks, last norm, head.

    ``rotary`` None: nothing is rotated. ``residual_in_float32``: what the blocks add to is float32 whatever the model
    computes in. ``layers``: the blocks of each.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    max_position: int
    norm_eps: float
    tied: bool
    rotary: RotarySpec | None
    layers: tuple[tuple[BlockSpec, ...], ...]
    names: Names = Names()
    factors: Factors = Factors()
    residual_in_float32: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def layer_name(self, index: int) -> str:
        """Checkpoint name of one layer."""
        return f"{self.names.layers}.{index}"

    def mixers(self) -> Iterator[MixerSpec]:
        """Of all layers, in order."""
        return (mixer for layer in self.layers for block in layer for mixer in block.mixers)

    @property
    def attentions(self) -> tuple[AttentionSpec, ...]:
        """The mixers that attend."""
        return tuple(mixer for mixer in self.mixers() if isinstance(mixer, AttentionSpec))

    @property
    def mambas(self) -> tuple[MambaSpec, ...]:
        """The mixers that keep states."""
        return tuple(mixer for mixer in self.mixers() if isinstance(mixer, MambaSpec))

    def kv_spec(self, size: int = 1) -> KVSpec | None:
        """What one of ``size`` ranks needs of the key/value cache; None: the model does not attend."""
        layers = self.attentions
        if not layers:
            return None
        return KVSpec(len(layers), max(layers[0].kv_heads // size, 1), layers[0].head_dim)

    def state_shape(self, size: int = 1) -> StateShape | None:
        """What one of ``size`` ranks keeps of a sequence beside that; None: the model has no state-space layers."""
        layers = self.mambas
        return layers[0].state_shape(size, len(layers)) if layers else None

    def sites(self) -> tuple[Site, ...]:
        """Every adaptable module. A tied head is a site of its own: adapters may target it apart."""
        by_tokens = Cut(Shard.ROW, self.vocab_size, "vocab_size")
        embed = Site(self.names.embed, SiteKind.EMBEDDING, self.vocab_size, self.hidden_size, cut=by_tokens)
        head = Site(
            self.names.head,
            SiteKind.LINEAR,
            self.hidden_size,
            self.vocab_size,
            cut=replace(by_tokens, shard=Shard.COLUMN),
        )
        layers = (site for index in range(self.num_layers) for site in self._layer_sites(index))
        return (embed, *layers, norm_site(self.names.norm, self.hidden_size), head)

    def _layer_sites(self, index: int) -> tuple[Site, ...]:
        blocks = self.layers[index]
        mixed = [site for block in blocks for mixer in block.mixers for site in mixer.sites()]
        norms = [norm_site(block.norm, self.hidden_size) for block in blocks]
        found = (
            *(site for site in mixed if site.kind is not SiteKind.NORM),
            *norms,
            *(site for site in mixed if site.kind is SiteKind.NORM),
        )
        return below(self.layer_name(index), found)

    def matrices(self) -> dict[str, Matrix]:
        """Every matrix the checkpoint must hold, by its module's name, in checkpoint order; a tied head has none."""
        ends = (self.names.embed, self.names.head)
        return {
            site.name: Matrix(site.name, *_two(site.weight_shape), site.name in ends, site.bias)
            for site in self.sites()
            if site.kind in (SiteKind.LINEAR, SiteKind.EMBEDDING) and not (self.tied and site.name == self.names.head)
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor a dense checkpoint must hold -> its shape."""
        return {
            key: shape
            for site in self.sites()
            if not (self.tied and site.name == self.names.head)
            for key, shape in site.tensors().items()
        }


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, cols = shape
    return rows, cols


@dataclass(frozen=True, slots=True)
class FamilyParts:
    """What a family adds to the plain skeleton. ``windows`` has one entry a layer; None there is full attention."""

    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    default_head_dim: int | None = None


def head_sizes(config: ConfigFields, default_head_dim: int | None = None) -> tuple[int, int, int]:
    """Query heads, key and value heads, and the size of each.

    Raises InvalidModel naming key and value for a missing or contradictory dimension.
    """
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        config.refuse("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    if not config.has("head_dim") and default_head_dim is None and hidden % heads:
        config.refuse("hidden_size", f"a multiple of num_attention_heads = {heads}, as there is no head_dim")
    return heads, kv_heads, config.integer("head_dim", default_head_dim or hidden // heads)


def activation_of(config: ConfigFields, key: str = "hidden_act", default: str = "silu") -> str:
    """The activation that stands under ``key``. Raises UnsupportedFeature for one we do not have."""
    activation = config.text(key, default)
    if activation not in ACTIVATIONS:
        raise UnsupportedFeature(f"{key} {activation!r}; supported are {', '.join(ACTIVATIONS)}", field=key)
    return activation


def decoder_spec(architecture: str, config: ConfigFields, parts: FamilyParts) -> DecoderSpec:
    """Read what the families of attention and feed-forward layers share.

    Raises InvalidModel naming key and value for a missing or contradictory dimension, UnsupportedFeature for an
    activation or rope scaling we do not have.
    """
    hidden, eps = config.integer("hidden_size"), config.number("rms_norm_eps", 1e-6)
    heads, kv_heads, head_dim = head_sizes(config, parts.default_head_dim)
    if head_dim % 2:
        raise InvalidModel(f"config.json: head_dim is {head_dim}, rotary embedding needs an even one", field="head_dim")
    attention = AttentionSpec(
        hidden,
        heads,
        kv_heads,
        head_dim,
        qkv_bias=parts.qkv_bias,
        o_bias=parts.o_bias,
        norm_eps=eps if parts.qk_norm else None,
    )
    mlp = MlpSpec(hidden, config.integer("intermediate_size"), activation_of(config), bias=parts.mlp_bias)
    max_position = config.integer("max_position_embeddings")
    return DecoderSpec(
        architecture=architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        max_position=max_position,
        norm_eps=eps,
        tied=config.flag("tie_word_embeddings", False),
        rotary=rotary_spec(config, head_dim, max_position),
        layers=tuple(
            (
                BlockSpec("input_layernorm", (replace(attention, window=window),)),
                BlockSpec("post_attention_layernorm", (mlp,)),
            )
            for window in parts.windows
        ),
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
