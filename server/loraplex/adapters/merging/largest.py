"""Magnitude pruning: which values of a tensor are its largest.

They are those above the largest one that is not kept, which is found without sorting: a sample bounds where it lies,
and only the few values between these bounds are looked through. Where it has equals among the kept, ``topk`` chooses.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

#: values that are sampled; of fewer than twice as many all are looked through
_SAMPLE: Final = 1 << 15
#: places in the sample on each side of where it should be: 3 standard deviations, which are sqrt(_SAMPLE) / 2 at most
_MARGIN: Final = 256

_Sizes = npt.NDArray[np.float32]


def largest(tensor: torch.Tensor, count: int, out: torch.Tensor) -> torch.Tensor:
    """``tensor``, float32, with all but ``count`` values (fewer than it has) of the largest size set to 0; in ``out``,
    contiguous and of its shape.

    Which of equal ones is kept is as PEFT has it.
    """
    sizes = torch.abs(tensor, out=out).view(-1)
    bound = float(_at(sizes.numpy(), len(sizes) - count - 1))
    if bound > 0 and np.count_nonzero(sizes.numpy() > bound) != count:
        chosen = sizes.topk(count, sorted=False).indices  # which has an order of its own among equals
        sizes.zero_()[chosen] = 1
    else:
        sizes.gt_(bound)
    return out.mul_(tensor)


def _at(sizes: _Sizes, place: int) -> np.float32:
    """What would stand at ``place`` if ``sizes`` were sorted."""
    if len(sizes) > 2 * _SAMPLE:
        step = len(sizes) // _SAMPLE
        while math.gcd(step, len(sizes)) > 1:  # else it goes through some of a matrix's columns only, which differ
            step -= 1
        sample = sizes[::step]
        middle = place * len(sample) // len(sizes)
        low, high = max(middle - _MARGIN, 0), min(middle + _MARGIN, len(sample) - 1)
        bounds = np.partition(sample, (low, high))
        chosen = sizes >= bounds[low]
        among = place - len(sizes) + int(np.count_nonzero(chosen))
        chosen &= sizes <= bounds[high]
        between = np.compress(chosen, sizes)
        if 0 <= among < len(between):
            return _at_sorted(between, among)
    return _at_sorted(sizes, place)


def _at_sorted(sizes: _Sizes, place: int) -> np.float32:
    found: np.float32 = np.partition(sizes, place)[place]
    return found
