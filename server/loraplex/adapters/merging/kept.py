"""Which values of a matrix are kept, a bit for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from loraplex.adapters.merging.matrix import Block
from loraplex.adapters.merging.stack import Stack

#: random values that are made at once
_DRAWS: Final = 1 << 16

Bits = npt.NDArray[np.uint8]
"""``[..., rows, columns / 8]``."""


def packed(chosen: npt.NDArray[np.bool_]) -> Bits:
    """Of ``[..., rows, columns]``."""
    return np.packbits(chosen, axis=-1)


def drawn(stack: Stack, share: float, generator: torch.Generator) -> Drawn:
    """With about this share of the values of each. The draws of PEFT's bernoulli, which takes four times as long."""
    rows, columns = stack.shape
    bits = np.empty((len(stack), rows, -(-columns // 8)), np.uint8)
    step = max(1, _DRAWS // columns)
    for of_one in bits:
        for first in range(0, rows, step):
            values = torch.rand(min(step, rows - first), columns, generator=generator).numpy()
            of_one[first : first + step] = packed(values < np.float32(share))
    return Drawn(stack, bits, share)


@dataclass(frozen=True, slots=True)
class Kept:
    """The values of a matrix that have a bit."""

    bits: Bits

    def keep_(self, values: torch.Tensor, at: Block) -> None:
        """Set all others of the block to 0."""
        values.mul_(_unpacked(self.bits, at))


@dataclass(frozen=True, slots=True)
class Drawn:
    """``stack`` with only the values that have a bit in ``bits`` ``[n, rows, columns / 8]``, divided by ``share``."""

    stack: Stack
    bits: Bits
    share: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.stack.shape

    def __len__(self) -> int:
        return len(self.stack)

    def fill(self, at: Block, out: torch.Tensor) -> None:
        self.stack.fill(at, out)
        for values, bits in zip(out, self.bits, strict=True):  # one by one: they are converted to as many float32
            values.mul_(_unpacked(bits, at))
        out.div_(self.share)


def _unpacked(bits: Bits, at: Block) -> torch.Tensor:
    """1 where there is one, 0 elsewhere."""
    first, end = at.columns.start, at.columns.stop
    return torch.from_numpy(np.unpackbits(bits[at.rows, first // 8 : -(-end // 8)], axis=1, count=end - first))
