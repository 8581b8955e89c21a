"""Merging A's with A's and B's with B's: cheap, and of the inputs' own rank, but not the sum of their changes.

The product of two sums has the cross terms of different inputs in it. ``coefficient = weight * scale`` is divided
between both factors: B's are multiplied by the root of its size, A's by the same root with its sign.

Source: peft 0.21 tuners/lora/model.py ``_generalized_task_arithmetic_weighted_adapter``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from loraplex.adapters.merging.combination import Combination
from loraplex.adapters.merging.matrix import Matrix
from loraplex.adapters.merging.part import Part
from loraplex_kernels.merging import Operand


def merge_factors(parts: Sequence[Part], combination: Combination) -> tuple[Callable[[], Matrix], Callable[[], Matrix]]:
    """A ``[r, in]`` and B ``[out, r]`` of the result; all parts have rank r."""
    roots = [math.sqrt(abs(part.coefficient)) for part in parts]
    signed = [math.copysign(root, part.coefficient) for root, part in zip(roots, parts, strict=True)]
    a = combination.begin([Operand(None, part.low_rank.a) for part in parts], signed)
    b = combination.begin([Operand(None, part.low_rank.b) for part in parts], roots)
    return a, b
