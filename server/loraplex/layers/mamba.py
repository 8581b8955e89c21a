"""The Mamba2 mixer: one projection, a causal convolution, the state-space scan, a gated norm, the projection back.

Adapters' terms are in each projection's output before anything is made of it, so that nothing here knows of them but
the small parameters that they may replace. Does not know how states are kept, nor which rows belong to which sequence.

Source: Dao and Gu 2024, section 7.1; transformers' Mamba2Mixer, of which FalconH1Mixer adds the multipliers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex.layers.gated_norm import GatedNorm
from loraplex.layers.linear import Linear
from loraplex.layers.own_tensor import OwnTensor, by_span, span_starts
from loraplex.layers.step import LayerStep
from loraplex_kernels.conv import ConvBackend, ConvWeights
from loraplex_kernels.ssd import GateNorm, SsdBackend, SsdInputs, SsdParameters


@dataclass(frozen=True, slots=True)
class MambaShape:
    """One layer's geometry on this rank; ``layer`` counts the state-space layers."""

    layer: int
    heads: int
    head_dim: int
    groups: int
    state_size: int

    @property
    def inner(self) -> int:
        """Values of all heads."""
        return self.heads * self.head_dim

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Outputs of in_proj, in their order: z, x, B, C, dt."""
        return self.inner, self.inner, self.groups * self.state_size, self.groups * self.state_size, self.heads


@dataclass(frozen=True, slots=True)
class MambaScales:
    """Constants of Falcon-H1: of the layer's input, of each output of in_proj ``[sum of sizes]``, of the layer's."""

    inputs: float = 1.0
    projected: torch.Tensor | None = None
    outputs: float = 1.0


@dataclass(frozen=True, slots=True)
class MambaParts:
    """The pieces the mixer is made of. ``norm`` None: the scan is gated without one. ``limits`` of time steps."""

    in_proj: Linear
    conv: OwnTensor
    a_log: OwnTensor
    d: OwnTensor
    dt_bias: OwnTensor
    norm: GatedNorm | None
    out_proj: Linear
    limits: tuple[float, float]
    conv_backend: ConvBackend
    ssd_backend: SsdBackend


class MambaMixer:
    """``[T, H]`` -> ``[T, H]``; reads and writes its layer's states of the step's sequences."""

    __slots__ = (
        "_convolve",
        "_norm",
        "_own_conv",
        "_parameters",
        "_parts",
        "_scales",
        "_scan",
        "_shape",
        "_vectors",
        "_weights",
    )

    def __init__(self, shape: MambaShape, parts: MambaParts, scales: MambaScales) -> None:
        self._shape = shape
        self._parts = parts
        self._scales = scales
        self._own_conv = parts.conv
        self._vectors = (parts.a_log, parts.d, parts.dt_bias)
        self._weights = ConvWeights(_by_tap(parts.conv.weight), parts.conv.bias)
        self._parameters = SsdParameters(
            _decay(parts.a_log.weight), parts.d.weight.float(), parts.dt_bias.weight.float(), parts.limits
        )
        self._norm = parts.norm
        self._convolve = parts.conv_backend.convolve
        self._scan = parts.ssd_backend.scan

    def __call__(self, x: torch.Tensor, step: LayerStep) -> torch.Tensor:
        shape, parts, states = self._shape, self._parts, step.states
        assert states is not None, "a step without states"
        if self._scales.inputs != 1.0:
            x = x * self._scales.inputs
        projected = parts.in_proj(x, step.adapters)  # [T, z | x | B | C | dt]
        if self._scales.projected is not None:
            projected.mul_(self._scales.projected)
        inner, state_width = shape.inner, shape.groups * shape.state_size
        first_dt = 2 * inner + 2 * state_width
        mixed = self._convolve(
            projected[:, inner:first_dt], self._kernel(step), states.pool.conv[shape.layer], states.conv
        )
        by_group = (-1, shape.groups, shape.state_size)
        inputs = SsdInputs(
            mixed[:, :inner].view(-1, shape.heads, shape.head_dim),
            projected[:, first_dt:],
            mixed[:, inner : inner + state_width].view(by_group),
            mixed[:, inner + state_width :].view(by_group),
        )
        y = self._scan(inputs, self._constants(step), states.pool.ssd[shape.layer], states.ssd)
        z = projected[:, :inner]
        y = parts.ssd_backend.gate(y, z, _PLAIN) if self._norm is None else self._norm(y, z, step.adapters)
        out = parts.out_proj(y, step.adapters)
        return out if self._scales.outputs == 1.0 else out.mul_(self._scales.outputs)

    def _kernel(self, step: LayerStep) -> ConvWeights:
        """The convolution's, or one for each sequence."""
        owned = self._own_conv.owned(step.adapters)
        if not owned:
            return self._weights
        assert step.states is not None
        starts, bias = span_starts(step.states.spans), self._weights.bias
        values = [(one, one.rows.values) for one in owned]
        weight = by_span(self._weights.weight, [(one, _by_tap(own)) for one, own in values if own is not None], starts)
        if bias is not None:
            bias = by_span(bias, [(one, one.rows.bias) for one in owned if one.rows.bias is not None], starts)
        return ConvWeights(weight, bias)

    def _constants(self, step: LayerStep) -> SsdParameters:
        """The scan's, or one row of them for each sequence."""
        owned = [vector.owned(step.adapters) for vector in self._vectors]
        base = self._parameters
        if not any(owned):
            return base
        assert step.states is not None
        starts = span_starts(step.states.spans)
        a, d, dt_bias = (
            by_span(whole, [(one, made(one.rows.values)) for one in some if one.rows.values is not None], starts)
            for whole, some, made in zip((base.a, base.d, base.dt_bias), owned, _MADE, strict=True)
        )
        return SsdParameters(a, d, dt_bias, base.limits)


_PLAIN = GateNorm(None, 1, 0.0)


def _decay(a_log: torch.Tensor) -> torch.Tensor:
    return -a_log.float().exp()


def _as_float(vector: torch.Tensor) -> torch.Tensor:
    return vector.float()


_MADE = (_decay, _as_float, _as_float)


def _by_tap(weight: torch.Tensor) -> torch.Tensor:
    """A kernel ``[C, K]`` or ``[C, 1, K]`` as the op takes it, ``[K, C]``."""
    return weight.view(weight.shape[0], -1).T.contiguous()
