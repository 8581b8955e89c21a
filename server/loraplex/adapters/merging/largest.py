"""Magnitude pruning: which values of a matrix are its largest.

They are those above the largest one that is not kept, which is found without sorting: a sample bounds where it lies,
and only the few values between these bounds are looked through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from loraplex.adapters.merging.kept import Bits, Kept, packed
from loraplex.adapters.merging.matrix import Block, Changed, Matrix, blocks, remembered, whole

#: values that are sampled; of fewer than twice as many all are looked through
_SAMPLE: Final = 1 << 14
#: places in the sample on each side of where it should be: 3 standard deviations, which are sqrt(_SAMPLE) / 2 at most
_MARGIN: Final = 192

#: values of a matrix in which PEFT's choice among equal ones is made again, which takes all of them at once
_CHOSEN_AS_PEFT: Final = 1 << 20

_Sizes = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Largest(Changed):
    """``matrix`` with all but ``count`` values (fewer than it has) of the largest size set to 0.

    Which of equal ones is kept is as PEFT has it, in matrices of no more than a million values. In larger ones, where
    float32 leaves a few equal by chance, it is any.
    """

    count: int

    def block(self, at: Block) -> torch.Tensor:
        return self._kept.block(at)

    @cached_property
    def _kept(self) -> Matrix:
        rows, columns = self.shape
        bound, above = _cut(self.matrix, rows * columns - self.count - 1)
        if bound == 0 or above == self.count:
            return _Above(self.matrix, bound)
        if rows * columns > _CHOSEN_AS_PEFT:
            return Kept(self.matrix, _some_equal(self.matrix, bound, self.count - above), 1.0)
        chosen = np.zeros(rows * columns, np.bool_)
        # which has an order of its own among equals
        chosen[whole(self.matrix).abs().view(-1).topk(self.count, sorted=False).indices.numpy()] = True
        return Kept(self.matrix, packed(chosen.reshape(rows, columns)), 1.0)


@dataclass(frozen=True, slots=True)
class _Above(Changed):
    """``matrix`` with all but the values above ``bound`` in size set to 0."""

    bound: float

    def block(self, at: Block) -> torch.Tensor:
        return torch.nn.functional.hardshrink(self.matrix.block(at), self.bound)


def _some_equal(matrix: Matrix, bound: float, left: int) -> Bits:
    """All above the bound, and ``left`` of those at it."""
    rows, columns = matrix.shape
    bits = np.empty((rows, -(-columns // 8)), np.uint8)
    for at in blocks(matrix):
        block = matrix.block(at)
        sizes = _sizes(block)
        chosen, equal = sizes > bound, np.flatnonzero(sizes == bound)[:left]
        chosen[equal] = True
        left -= len(equal)
        bits[at.rows, at.columns.start // 8 : -(-at.columns.stop // 8)] = packed(chosen.reshape(block.shape))
    return bits


def _cut(matrix: Matrix, place: int) -> tuple[float, int]:
    """The size that would stand at ``place`` if all were sorted, and how many are above it."""
    rows, columns = matrix.shape
    matrix = remembered(matrix)
    count = rows * columns
    if count > 2 * _SAMPLE:
        sample = _sampled(matrix)
        middle = place * len(sample) // count
        bounds = max(middle - _MARGIN, 0), min(middle + _MARGIN, len(sample) - 1)
        sample.partition(bounds)
        if (found := _between(matrix, place, *sample[list(bounds)])) is not None:
            return found
    return _at(_sizes(whole(matrix)), place)


def _sampled(matrix: Matrix) -> _Sizes:
    """About ``_SAMPLE`` sizes, evenly from all blocks, as if these were one behind the other."""
    places, (rows, columns) = blocks(matrix), matrix.shape
    step, width = rows * columns // _SAMPLE, places[0].columns.stop
    while math.gcd(step, width) > 1:  # else it goes through some of its columns only, which differ
        step -= 1
    sample, first = [], 0
    for at in places:
        sizes = _sizes(matrix.block(at))
        sample.append(sizes[first::step].copy())  # a view would keep the block
        first = (first - len(sizes)) % step
    return np.concatenate(sample)


def _between(matrix: Matrix, place: int, low: float, high: float) -> tuple[float, int] | None:
    """As ``_cut``, if what stands there is no smaller than ``low`` and no larger than ``high``."""
    left_out, below, between = 0, 0, []
    for at in blocks(matrix):
        sizes = _sizes(matrix.block(at))
        chosen = sizes >= low
        below += len(sizes) - int(np.count_nonzero(chosen))
        chosen &= sizes <= high
        between.append(np.compress(chosen, sizes))
        left_out += len(sizes) - len(between[-1])
    among = np.concatenate(between)
    if not 0 <= place - below < len(among):
        return None
    bound, above = _at(among, place - below)
    return bound, left_out - below + above


def _at(sizes: _Sizes, place: int) -> tuple[float, int]:
    """As ``_cut``, of these, which are put into another order."""
    sizes.partition(place)
    bound = sizes[place]
    return float(bound), int(np.count_nonzero(sizes[place + 1 :] > bound))


def _sizes(block: torch.Tensor) -> _Sizes:
    sizes: _Sizes = block.abs().reshape(-1).numpy()
    return sizes
