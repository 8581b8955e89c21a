"""Rope parameters of config.json, in transformers 4's spelling (rope_theta, rope_scaling) and 5's (rope_parameters)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from loraplex.errors import InvalidModel, UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.layers.rotary import LinearScaling, Llama3Scaling, RotarySpec, Scaling, YarnScaling, yarn_attention_factor


def rotary_spec(config: ConfigFields, head_dim: int, max_position: int, rotated: float | None = None) -> RotarySpec:
    """Precedence as in transformers: a non-empty ``rope_scaling`` before ``rope_parameters``, their own theta before
    the top level's, then 10000. ``rotated``: the share of a head's dimensions, where the config has none and may have
    one; None: all are.

    Raises UnsupportedFeature for scalings, partial rotation and per-layer-type parameters we do not have, InvalidModel
    for values out of range.
    """
    rope = config.section("rope_scaling") or config.section("rope_parameters") or ConfigFields({})
    nested = rope.sections()
    if nested:
        raise UnsupportedFeature(f"rope_parameters per layer type ({', '.join(nested)}); supported is one set for all")
    partial = rope.number("partial_rotary_factor", rotated or config.number("partial_rotary_factor", 1.0))
    if rotated is None and partial != 1.0:
        raise UnsupportedFeature(f"partial_rotary_factor {partial}; supported is 1")
    rope_type = rope.text("rope_type", rope.text("type", "default"))
    if rope_type not in _SCALINGS:
        raise UnsupportedFeature(f"rope_type {rope_type!r}; supported are {', '.join(_SCALINGS)}")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    if theta <= 1.0:
        raise InvalidModel(f"config.json: rope_theta is {theta}, expected a number above 1", field="rope_theta")
    original = config.integer(
        "original_max_position_embeddings", rope.integer("original_max_position_embeddings", max_position)
    )
    dim = int(head_dim * partial)
    if dim % 2 or not 0 < dim <= head_dim:
        raise InvalidModel(
            f"config.json: partial_rotary_factor {partial} of head_dim {head_dim} rotates {dim} dimensions, expected "
            f"an even number of them",
            field="partial_rotary_factor",
        )
    return RotarySpec(dim, theta, _SCALINGS[rope_type](rope, original, max_position))


def _default(rope: ConfigFields, original: int, max_position: int) -> Scaling | None:
    return None


def _linear(rope: ConfigFields, original: int, max_position: int) -> Scaling | None:
    return LinearScaling(rope.number("factor"))


def _llama3(rope: ConfigFields, original: int, max_position: int) -> Scaling | None:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        rope.refuse("high_freq_factor", f"a number above low_freq_factor = {low}")
    return Llama3Scaling(rope.number("factor"), low, high, original)


def _yarn(rope: ConfigFields, original: int, max_position: int) -> Scaling | None:
    factor = rope.number("factor", max_position / original)
    mscale = rope.number("mscale") if rope.has("mscale") else None
    mscale_all_dim = rope.number("mscale_all_dim") if rope.has("mscale_all_dim") else None
    return YarnScaling(
        factor=factor,
        original_max_position=original,
        attention_factor=rope.number("attention_factor", yarn_attention_factor(factor, mscale, mscale_all_dim)),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
    )


_SCALINGS: Final[Mapping[str, Callable[[ConfigFields, int, int], Scaling | None]]] = MappingProxyType(
    {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
)
