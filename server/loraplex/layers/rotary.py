"""Rotary position embedding: frequencies for every supported scaling, and their use on packed queries and keys.

Sources: Su et al. 2021 (RoFormer); scalings as in transformers' ``modeling_rope_utils`` (linear, llama3, yarn), to
which the frequencies are equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every frequency divided by ``factor``."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Long wavelengths divided by ``factor``, short ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """A ramp between interpolation and extrapolation, and a softmax temperature (Peng et al., arXiv 2309.00071)."""

    factor: float
    original_max_position: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool


Scaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, slots=True)
class RotarySpec:
    """Base wavelength and scaling; no scaling is the original embedding. ``head_dim``: how many of a head's first
    dimensions are rotated."""

    head_dim: int
    theta: float
    scaling: Scaling | None = None


class Rotation(NamedTuple):
    """One step's angles, shared by all layers."""

    cos: torch.Tensor  # [T, 1, D]
    sin: torch.Tensor  # [T, 1, D]; its first half negated


class Rotary:
    """Turns positions into rotations. Angles are computed in float32 and rounded once to ``dtype``."""

    __slots__ = ("_dtype", "_inv_freq", "_magnitude")

    def __init__(self, spec: RotarySpec, *, dtype: torch.dtype, device: torch.device) -> None:
        self._inv_freq = inverse_frequencies(spec).to(device)
        self._magnitude = attention_magnitude(spec)
        self._dtype = dtype

    def __call__(self, positions: torch.Tensor) -> Rotation:
        """``[T]`` int64 -> angles of each position."""
        angles = positions.unsqueeze(-1).float() * self._inv_freq  # [T, D / 2]
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        if self._magnitude != 1.0:
            cos.mul_(self._magnitude)
            sin.mul_(self._magnitude)
        return Rotation(cos.to(self._dtype).unsqueeze(1), sin.to(self._dtype).unsqueeze(1))


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate dimension i against i + D/2 of every head's first D: ``[T, N, >= D]`` -> a new tensor, its like."""
    size = rotation.cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat((rotate(x[..., :size], rotation), x[..., size:]), -1)
    # the sign stands in sin, so a roll by half brings each value's partner: three passes, the fewest measured
    return torch.addcmul(x * rotation.cos, x.roll(x.shape[-1] // 2, -1), rotation.sin)


def inverse_frequencies(spec: RotarySpec) -> torch.Tensor:
    """Radians per position of each pair of dimensions, float32 ``[D / 2]``."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    inv_freq = 1.0 / (spec.theta**exponents)
    match spec.scaling:
        case None:
            return inv_freq
        case LinearScaling(factor):
            return inv_freq / factor
        case Llama3Scaling() as llama3:
            return _llama3(inv_freq, llama3)
        case YarnScaling() as yarn:
            return _yarn(spec, yarn)


def attention_magnitude(spec: RotarySpec) -> float:
    """What cosines and sines are multiplied by (yarn's attention factor, else 1)."""
    match spec.scaling:
        case YarnScaling(attention_factor=magnitude):
            return magnitude
        case _:
            return 1.0


def _llama3(inv_freq: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > context / low, inv_freq / scaling.factor, inv_freq)
    smooth = (context / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    medium = ~(wavelength < context / high) & ~(wavelength > context / low)
    return torch.where(medium, smoothed, scaled)


def _yarn(spec: RotarySpec, scaling: YarnScaling) -> torch.Tensor:
    dim = spec.head_dim

    def correction_dim(rotations: float) -> float:
        turns = scaling.original_max_position / (rotations * 2 * math.pi)
        return (dim * math.log(turns)) / (2 * math.log(spec.theta))

    round_low, round_high = _ROUNDING[scaling.truncate]
    low = max(round_low(correction_dim(scaling.beta_fast)), 0)
    high = min(round_high(correction_dim(scaling.beta_slow)), dim - 1)
    if low == high:
        high += 0.001  # a ramp of zero width would divide by zero
    wavelengths = spec.theta ** (torch.arange(0, dim, 2).float() / dim)
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    extrapolated = 1 - ramp
    return (1.0 / (scaling.factor * wavelengths)) * (1 - extrapolated) + (1.0 / wavelengths) * extrapolated


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """YarnScaling's softmax temperature when the checkpoint does not give it (section 3.4 of the paper)."""

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)


def _keep(value: float) -> float:
    return value


_ROUNDING: dict[bool, tuple[Callable[[float], float], Callable[[float], float]]] = {
    True: (math.floor, math.ceil),
    False: (_keep, _keep),
}
