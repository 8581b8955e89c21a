"""The Mamba2 mixer's sizes of config.json, whose keys every family spells its own way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from loraplex.errors import UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.models.mixers.mamba import MambaNorm, MambaSpec

#: what the fused kernels of all families compute behind the convolution
_ACTIVATIONS: Final = ("silu", "swish")
#: how transformers 5 writes a number that JSON has not
_SPECIAL: Final = "__float__"


@dataclass(frozen=True, slots=True)
class MambaKeys:
    """Key of each size, and what keys that are absent say. ``expand`` "": the inner width is heads times their size,
    whatever the hidden size."""

    heads: str
    head_dim: str
    state_size: str
    groups: str
    conv_width: str
    expand: str
    chunk_size: str
    in_bias: str
    out_bias: str
    conv_bias: str
    activation: str
    time_step_limit: str
    defaults: Mapping[str, int] = field(default_factory=dict)


#: of Bamba, Falcon-H1 and GraniteMoeHybrid
HYBRID_KEYS: Final = MambaKeys(
    heads="mamba_n_heads",
    head_dim="mamba_d_head",
    state_size="mamba_d_state",
    groups="mamba_n_groups",
    conv_width="mamba_d_conv",
    expand="mamba_expand",
    chunk_size="mamba_chunk_size",
    in_bias="mamba_proj_bias",
    out_bias="mamba_proj_bias",
    conv_bias="mamba_conv_bias",
    activation="hidden_act",
    time_step_limit="time_step_limit",
    defaults=MappingProxyType(
        {"mamba_n_heads": 128, "mamba_d_state": 256, "mamba_n_groups": 1, "mamba_chunk_size": 256}
    ),
)


def mamba_spec(
    config: ConfigFields,
    keys: MambaKeys,
    hidden: int,
    norm: MambaNorm | None,
    *,
    name: str = "mixer",
    inner: int | None = None,
) -> MambaSpec:
    """``inner``: the width of all heads, where it does not follow from the hidden size.

    Raises InvalidModel naming key and value for a missing dimension or one that contradicts the others,
    UnsupportedFeature for an activation we do not have.
    """
    defaults = keys.defaults
    heads = config.integer(keys.heads, defaults.get(keys.heads))
    expanded = inner
    if expanded is None and keys.expand:
        expanded = hidden * config.integer(keys.expand, 2)
    head_dim = _head_dim(config, keys, heads, expanded, defaults.get(keys.head_dim))
    groups = config.integer(keys.groups, defaults.get(keys.groups))
    if heads % groups:
        config.refuse(keys.groups, f"a divisor of {keys.heads} = {heads}")
    width = config.integer(keys.conv_width, 4)
    if width < 2:
        config.refuse(keys.conv_width, "at least 2: a convolution over one position keeps no state")
    config.integer(keys.chunk_size, defaults.get(keys.chunk_size))  # how others cut a prompt; no result hangs on it
    activation = config.text(keys.activation, "silu")
    if activation not in _ACTIVATIONS:
        raise UnsupportedFeature(
            f"{keys.activation} {activation!r} behind the convolution; supported are {', '.join(_ACTIVATIONS)}",
            field=keys.activation,
        )
    return MambaSpec(
        hidden_size=hidden,
        heads=heads,
        head_dim=head_dim,
        groups=groups,
        state_size=config.integer(keys.state_size, defaults.get(keys.state_size)),
        conv_width=width,
        norm=norm,
        name=name,
        what=keys.heads,
        in_bias=config.flag(keys.in_bias, False),
        out_bias=config.flag(keys.out_bias, False),
        conv_bias=config.flag(keys.conv_bias, True),
        limits=_limits(config, keys.time_step_limit),
    )


def _head_dim(config: ConfigFields, keys: MambaKeys, heads: int, inner: int | None, default: int | None) -> int:
    """It may be "auto", and must agree with the width of all heads where that is known."""
    automatic = config.value(keys.head_dim) in (None, "auto") and inner is not None and default is None
    if automatic:
        assert inner is not None
        if inner % heads:
            config.refuse(keys.heads, f"a divisor of {inner}, the width of all heads")
        return inner // heads
    head_dim = config.integer(keys.head_dim, default)
    if inner is not None and heads * head_dim != inner:
        config.refuse(keys.head_dim, f"{inner} / {keys.heads} = {inner / heads:g}, so that all heads are {inner} wide")
    return head_dim


def _limits(config: ConfigFields, key: str) -> tuple[float, float]:
    """Least and largest time step. Raises InvalidModel: not two numbers, the first from 0 to the second."""
    value = config.value(key)
    if value is None:
        return 0.0, math.inf
    pair = [_number(one) for one in value] if isinstance(value, list) and len(value) == 2 else []
    if len(pair) != 2 or not 0 <= pair[0] <= pair[1]:
        config.refuse(key, "two numbers, the first at least 0 and at most the second")
    return pair[0], pair[1]


def _number(value: object) -> float:
    """NaN for what is no number."""
    if isinstance(value, dict) and value == {_SPECIAL: "Infinity"}:
        return math.inf
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
