"""Which values of a matrix are kept, a bit for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from loraplex.adapters.merging.matrix import Block, Changed

#: random values that are made at once
_DRAWS: Final = 1 << 16

Bits = npt.NDArray[np.uint8]
"""``[rows, columns / 8]``."""


def packed(chosen: npt.NDArray[np.bool_]) -> Bits:
    """Of ``[rows, columns]``."""
    return np.packbits(chosen, axis=1)


def drawn(shape: tuple[int, int], share: float, generator: torch.Generator) -> Bits:
    """A bit for about this share of the values of a matrix. The draws of PEFT's bernoulli, which takes four times as
    long."""
    rows, columns = shape
    bits = np.empty((rows, -(-columns // 8)), np.uint8)
    step = max(1, _DRAWS // columns)
    for first in range(0, rows, step):
        values = torch.rand(min(step, rows - first), columns, generator=generator).numpy()
        bits[first : first + step] = packed(values < np.float32(share))
    return bits


@dataclass(frozen=True, slots=True)
class Kept(Changed):
    """``matrix`` with only the values that have a bit, divided by ``share``; the others are 0."""

    bits: Bits
    share: float

    def block(self, at: Block) -> torch.Tensor:
        first, end = at.columns.start, at.columns.stop
        bits = np.unpackbits(self.bits[at.rows, first // 8 : -(-end // 8)], axis=1, count=end - first)
        return self.matrix.block(at).mul(torch.from_numpy(bits)).div_(self.share)
