"""The causal convolution in front of a state-space scan, prefill chunks and decodes in one call.

Contract, for each span s of a step (``states.StateSpan``), with in = its rows of x behind the K-1 inputs before them
(``states[source]``, or zeros), K the width of the kernel::

    out[i, c] = silu(bias[c] + sum_j weight[j, c] * in[i + j, c])      j = 0 .. K-1, in[i + K-1] being row i of x
    states[slot] = the last K-1 inputs after the last row              and after n rows, for each save (n, slot)

x is ``[T, C]``, of which rows may lie apart and values of one row may not; out is a new contiguous ``[T, C]`` of x's
dtype, computed in float32. What other slots hold never changes a result, nor is it changed; no value of one span
reaches another. Spans of one row come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex_kernels.states import StateSpan


@dataclass(frozen=True, slots=True)
class ConvWeights:
    """A layer's kernel, in x's dtype and contiguous: ``weight`` ``[K, C]``, ``bias`` ``[C]`` or None; or, where
    sequences have their own, ``[S, K, C]`` and ``[S, C]``, one for each span of the step. K is at least 2."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class ConvPlan(Protocol):
    """The spans of a step made ready by one backend, once a step, for all layers."""

    @property
    def num_tokens(self) -> int: ...


class StaticConvPlan(ConvPlan, Protocol):
    """A plan of single rows whose device memory never moves, for a captured graph. It has one row for each of its
    ``max_sequences``; those past the spans given are padding: their rows of out are zero and no slot is written."""

    def set(self, spans: Sequence[StateSpan]) -> bool:
        """Make these the spans of the next replay; False, and nothing changed, when they do not fit: too many, of
        several rows, or with saves."""
        ...


class ConvBackend(Protocol):
    """Makes step plans, and convolves. Chosen once at start."""

    name: str

    def prepare(self, spans: Sequence[StateSpan], device: torch.device) -> ConvPlan:
        """``spans`` hold to the rules of ``states.check_spans``."""
        ...

    def static_plan(self, max_sequences: int, device: torch.device) -> StaticConvPlan | None:
        """A plan for captured graphs; None: this backend's kernels cannot be captured."""
        ...

    def convolve(self, x: torch.Tensor, weights: ConvWeights, states: torch.Tensor, plan: ConvPlan) -> torch.Tensor:
        """out ``[T, C]``; ``states`` are the layer's, ``StatePool.conv[layer]``, changed in place.

        Raises ValueError for shapes or dtypes that do not fit.
        """
        ...
