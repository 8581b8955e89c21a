"""Magnitude pruning: which values of a matrix are its largest.

They are those above the largest one that is not kept, which is found without sorting: a sample bounds where it lies,
and only the few values between these bounds are looked through.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from loraplex.adapters.merging.matrix import BLOCK_ELEMENTS, Block, Matrix, block, whole
from loraplex_kernels.merging import BITS_PADDING, Bits, MergingBackend, Operand, Rule, Term, packed

#: values that are sampled
_SAMPLE: Final = 1 << 12
#: places in the sample on each side of where it should be; at first 3 standard deviations, which are sqrt(_SAMPLE) / 2
#: at most
_MARGINS: Final = (96, 192, 768, _SAMPLE)
#: no more values than so many are not sampled first
_VALUES: Final = 1 << 17
#: values of a matrix in which PEFT's choice among equal ones is made again, which takes memory for six of it: of one
#: that is there, and of a product
_CHOSEN_AS_PEFT: Final = 1 << 20
_PRODUCT_CHOSEN_AS_PEFT: Final = 1 << 16

_Sizes = npt.NDArray[np.float32]


def largest(term: Term, count: int, backend: MergingBackend) -> Term:
    """``term`` with the ``count`` values (fewer than it has) of the largest size alone.

    Which of equal ones is kept is as PEFT has it, in factors of no more than a million values, which may have many, and
    in small products of them. In larger ones, where float32 leaves a few equal by chance, it is any.
    """
    operand, size = term.operand, math.prod(term.operand.shape)
    bound, above = _cut(operand, size - count - 1, backend)
    if bound == 0 or above == count:
        return replace(term, bound=bound)
    matrix = _values_of(operand, backend)
    if size > (_CHOSEN_AS_PEFT if operand.left is None else _PRODUCT_CHOSEN_AS_PEFT):
        return replace(term, bits=_some_equal(matrix, bound, count - above))
    chosen = np.zeros(size, np.bool_)
    # which has an order of its own among equals
    chosen[whole(matrix).abs().view(-1).topk(count, sorted=False).indices.numpy()] = True
    return replace(term, bits=packed(chosen))


def _values_of(operand: Operand, backend: MergingBackend) -> Matrix:
    return backend.combined([Term(operand)], Rule())


def _some_equal(matrix: Matrix, bound: float, left: int) -> Bits:
    """All above the bound, and ``left`` of those at it."""
    rows, columns = matrix.shape
    bits = np.zeros(-(-rows * columns // 8) + BITS_PADDING, np.uint8)
    step = max(1, BLOCK_ELEMENTS // columns // 8) * 8  # rows whose bits are whole bytes
    for first in range(0, rows, step):
        at = Block(slice(first, min(first + step, rows)), slice(0, columns))
        sizes = block(matrix, at).abs_().view(-1).numpy()
        equal = np.flatnonzero(sizes == bound)[:left]
        chosen = sizes > bound
        chosen[equal] = True
        left -= len(equal)
        start = first * columns // 8
        bits[start : start - (-len(chosen) // 8)] = np.packbits(chosen, bitorder="little")
    return bits


def _cut(operand: Operand, place: int, backend: MergingBackend) -> tuple[float, int]:
    """The size that would stand at ``place`` if all were sorted, and how many are above it."""
    size = math.prod(operand.shape)
    if size > _VALUES:
        sample = np.sort(_sampled(operand))
        middle = place * len(sample) // size
        for margin in _MARGINS:
            low, high = sample[max(middle - margin, 0)], sample[min(middle + margin, len(sample) - 1)]
            if (found := _between(operand, place, (float(low), float(high)), backend)) is not None:
                return found
    return _at(whole(_values_of(operand, backend)).abs_().view(-1).numpy(), place)


def _sampled(operand: Operand) -> _Sizes:
    """About ``_SAMPLE`` sizes, of places that are evenly far from each other."""
    sizes: _Sizes = operand.at(*_places(operand.shape)).abs_().numpy()
    return sizes


@lru_cache(maxsize=16)  # those of a model's sites
def _places(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Their rows, and their columns."""
    rows, columns = shape
    step = rows * columns // _SAMPLE
    while math.gcd(step, columns) > 1:  # else it goes through some of its columns only, which differ
        step -= 1
    places = torch.arange(0, rows * columns, step)
    return places // columns, places % columns


def _between(
    operand: Operand, place: int, bounds: tuple[float, float], backend: MergingBackend
) -> tuple[float, int] | None:
    """As ``_cut``, if what stands there is no smaller and no larger than ``bounds``."""
    below, between = backend.gathered(operand, *bounds)
    if not 0 <= place - below < len(between):
        return None
    bound, above = _at(between.numpy(), place - below)
    return bound, math.prod(operand.shape) - below - len(between) + above


def _at(sizes: _Sizes, place: int) -> tuple[float, int]:
    """As ``_cut``, of these, which are put into another order."""
    sizes.partition(place)
    bound = sizes[place]
    return float(bound), int(np.count_nonzero(sizes[place + 1 :] > bound))
