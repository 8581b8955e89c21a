"""Magnitude pruning: which values of a matrix are its largest.

They are those above the largest one that is not kept, which is found without sorting: a sample bounds where it lies,
and only the few values between these bounds are looked through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from loraplex.adapters.merging.kept import Bits, Chosen, Kept, packed
from loraplex.adapters.merging.matrix import Block, Held, Input, Matrix, block, blocks, whole

#: values that are sampled; of fewer than twice as many all are looked through
_SAMPLE: Final = 1 << 12
#: places in the sample on each side of where it should be; at first 3 standard deviations, which are sqrt(_SAMPLE) / 2
#: at most
_MARGINS: Final = (96, 192, 768, _SAMPLE)
#: values that are looked through at once, about
_VALUES: Final = 1 << 17
#: values of a matrix in which PEFT's choice among equal ones is made again, which takes memory for six of it: of one
#: that is there, and of a product
_CHOSEN_AS_PEFT: Final = 1 << 20
_PRODUCT_CHOSEN_AS_PEFT: Final = 1 << 16

_Sizes = npt.NDArray[np.float32]


def largest(matrix: Input, count: int) -> Chosen:
    """The ``count`` values (fewer than it has) of the largest size.

    Which of equal ones is kept is as PEFT has it, in factors of no more than a million values, which may have many, and
    in small products of them. In larger ones, where float32 leaves a few equal by chance, it is any; and as their
    values are looked for one by one and in larger blocks than they are asked for in, a matrix library that rounds these
    otherwise may have one that is a rounding from the cut on its other side.
    """
    bound, above = _cut(matrix, math.prod(matrix.shape) - count - 1)
    if bound == 0 or above == count:
        return _Above(bound)
    if math.prod(matrix.shape) > (_CHOSEN_AS_PEFT if isinstance(matrix, Held) else _PRODUCT_CHOSEN_AS_PEFT):
        return Kept(_some_equal(matrix, bound, count - above))
    chosen = np.zeros(math.prod(matrix.shape), np.bool_)
    # which has an order of its own among equals
    chosen[whole(matrix).abs().view(-1).topk(count, sorted=False).indices.numpy()] = True
    return Kept(packed(chosen.reshape(matrix.shape)))


@dataclass(frozen=True, slots=True)
class _Above:
    """Those above ``bound`` in size."""

    bound: float

    def keep_(self, values: torch.Tensor, at: Block) -> None:
        torch.hardshrink(values, self.bound, out=values)


def _some_equal(matrix: Matrix, bound: float, left: int) -> Bits:
    """All above the bound, and ``left`` of those at it."""
    rows, columns = matrix.shape
    bits = np.empty((rows, -(-columns // 8)), np.uint8)
    for at in blocks(matrix, _VALUES):
        sizes = _sizes(block(matrix, at))
        chosen, equal = sizes > bound, np.flatnonzero(sizes == bound)[:left]
        chosen[equal] = True
        left -= len(equal)
        bits[at.rows, at.columns.start // 8 : -(-at.columns.stop // 8)] = packed(chosen.reshape(at.shape))
    return bits


def _cut(matrix: Input, place: int) -> tuple[float, int]:
    """The size that would stand at ``place`` if all were sorted, and how many are above it."""
    if math.prod(matrix.shape) > 2 * _SAMPLE:
        sample = np.sort(_sampled(matrix))
        middle = place * len(sample) // math.prod(matrix.shape)
        for margin in _MARGINS:
            low, high = sample[max(middle - margin, 0)], sample[min(middle + margin, len(sample) - 1)]
            if (found := _between(matrix, place, low, high)) is not None:
                return found
    return _at(_sizes(whole(matrix)), place)


def _sampled(matrix: Input) -> _Sizes:
    """About ``_SAMPLE`` sizes, of places that are evenly far from each other."""
    rows, columns = matrix.shape
    step = rows * columns // _SAMPLE
    while math.gcd(step, columns) > 1:  # else it goes through some of its columns only, which differ
        step -= 1
    places = torch.arange(0, rows * columns, step)
    return _sizes(matrix.at(places // columns, places % columns))


def _between(matrix: Matrix, place: int, low: float, high: float) -> tuple[float, int] | None:
    """As ``_cut``, if what stands there is no smaller than ``low`` and no larger than ``high``."""
    left_out, below, between = 0, 0, []
    for at in blocks(matrix, _VALUES):
        sizes = _sizes(block(matrix, at))
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


def _sizes(values: torch.Tensor) -> _Sizes:
    """Of all of them, which become these."""
    sizes: _Sizes = values.abs_().view(-1).numpy()
    return sizes
