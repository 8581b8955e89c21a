"""Magnitude pruning: which values of a tensor are its largest.

They are those above the largest one that is not kept, which is found without sorting: a sample bounds where it lies,
and only the few values between these bounds are looked through. Where it has equals among the kept, ``topk`` chooses.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

#: values that are sampled; of fewer than some times as many all are looked through
_SAMPLE: Final = 1 << 13
#: places in the sample on each side of where it should be: nearly 6 standard deviations, at most sqrt(_SAMPLE) / 2
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
    if len(sizes) > 4 * _SAMPLE:
        sample = np.sort(sizes[:: len(sizes) // _SAMPLE])
        middle = place * len(sample) // len(sizes)
        low, high = sample[max(middle - _MARGIN, 0)], sample[min(middle + _MARGIN, len(sample) - 1)]
        between = sizes[(sizes >= low) & (sizes <= high)]
        among = place - int(np.count_nonzero(sizes < low))
        if 0 <= among < len(between):
            return _at_sorted(between, among)
    return _at_sorted(sizes, place)


def _at_sorted(sizes: _Sizes, place: int) -> np.float32:
    found: np.float32 = np.partition(sizes, place)[place]
    return found
