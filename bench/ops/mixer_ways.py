"""Ways of a state-space layer, each seen to be right once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bench.ops.shapes import StateStep
from bench.ops.timing import Way, WrongResult
from loraplex_kernels.testing import worst_excess

#: of what a dtype allows: ways round in other orders
EXCESS = 2.0


def checked_way(
    name: str, step: StateStep, expected: torch.Tensor, made: Sequence[tuple[Callable[[], torch.Tensor], bool]]
) -> Way:
    """The calls, each with whether it can be captured. Raises WrongResult when one is not what the reference
    computes from the same states."""
    for call, _ in made:
        excess = worst_excess(call(), expected, expected.dtype)
        if excess > EXCESS:
            raise WrongResult(f"{name}, {step.name}: {excess:.2f} times the tolerance away from the reference")
    return Way(name, tuple(call for call, _ in made), capturable=all(captured for _, captured in made))
