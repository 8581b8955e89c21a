"""The state-space scan of Mamba2 and the gated norm behind it, prefill chunks and decodes in one call.

Contract of ``scan``, for each span s of a step (``states.StateSpan``), head h, and g the group that h belongs to
(heads are dealt out to groups in order, alike)::

    step_i = softplus(dt[i, h] + dt_bias[h])                  held to limits in the span's first num_limited rows
    S_i = exp(step_i * a[h]) * S_(i-1) + step_i * x[i, h] B[i, g]^T       S_(-1) = states[source, h], or zeros
    y[i, h] = S_i C[i, g] + d[h] * x[i, h]
    states[slot, h] = S after the last row                     and after n rows, for each save (n, slot)

x is ``[T, H, P]``, dt ``[T, H]``, B and C ``[T, G, N]``, H a multiple of G; rows may lie apart, the values of one row
may not. States are ``[H, P, N]``; they and all sums are float32. y is a new contiguous ``[T, H * P]`` of x's dtype.
What other slots hold never changes a result, nor is it changed; no value of one span reaches another. Spans of one row
come first.

Source: Dao and Gu 2024, "Transformers are SSMs", section 6 (the chunked form) and listing 1.

Contract of ``gate``, with groups of D / groups values side by side::

    norm(v) = v / sqrt(mean over its group of v^2 + eps) * weight          y is [T, D], z is [T, D]
    out = norm(y * silu(z)), or norm(y) * silu(z) where norm_before_gate, or y * silu(z) without a weight
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex_kernels.states import StateSpan


@dataclass(frozen=True, slots=True)
class SsdInputs:
    """What a layer scans: x ``[T, H, P]``, dt ``[T, H]``, b and c ``[T, G, N]``, all of one dtype."""

    x: torch.Tensor
    dt: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor


@dataclass(frozen=True, slots=True)
class SsdParameters:
    """A layer's ``a`` (below zero), ``d`` and ``dt_bias``, float32 ``[H]``; or, where sequences have their own, each
    ``[S, H]``, one row for each span of the step. Contiguous.

    ``limits``: least and largest time step of a span's limited rows.
    """

    a: torch.Tensor
    d: torch.Tensor
    dt_bias: torch.Tensor
    limits: tuple[float, float] = (0.0, math.inf)

    @property
    def are_limited(self) -> bool:
        """Whether the limits can change a time step, which is never below zero."""
        return self.limits[0] > 0.0 or self.limits[1] < math.inf


@dataclass(frozen=True, slots=True)
class GateNorm:
    """How a scan's output is gated: ``weight`` ``[D]`` or, one for each row of the step, ``[T, D]``; None: no norm."""

    weight: torch.Tensor | None
    groups: int
    eps: float
    norm_before_gate: bool = False


class SsdPlan(Protocol):
    """The spans of a step made ready by one backend, once a step, for all layers."""

    @property
    def num_tokens(self) -> int: ...


class StaticSsdPlan(SsdPlan, Protocol):
    """A plan of single rows whose device memory never moves, for a captured graph. It has one row for each of its
    ``max_sequences``; those past the spans given are padding: their rows of y are zero and no slot is written."""

    def set(self, spans: Sequence[StateSpan]) -> bool:
        """Make these the spans of the next replay; False, and nothing changed, when they do not fit: too many, of
        several rows, or with saves."""
        ...


class SsdBackend(Protocol):
    """Makes step plans, scans, and gates. Chosen once at start."""

    name: str

    def prepare(self, spans: Sequence[StateSpan], device: torch.device) -> SsdPlan:
        """``spans`` hold to the rules of ``states.check_spans``."""
        ...

    def static_plan(self, max_sequences: int, device: torch.device) -> StaticSsdPlan | None:
        """A plan for captured graphs; None: this backend's kernels cannot be captured."""
        ...

    def scan(self, inputs: SsdInputs, parameters: SsdParameters, states: torch.Tensor, plan: SsdPlan) -> torch.Tensor:
        """y ``[T, H * P]``; ``states`` are the layer's, ``StatePool.ssd[layer]``, changed in place.

        Raises ValueError for shapes or dtypes that do not fit.
        """
        ...

    def gate(self, y: torch.Tensor, z: torch.Tensor, norm: GateNorm) -> torch.Tensor:
        """A new contiguous ``[T, D]`` of y's dtype; rows of z may lie apart."""
        ...
