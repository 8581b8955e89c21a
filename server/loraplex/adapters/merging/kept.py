"""Which values of a matrix are kept, a bit for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from loraplex.adapters.merging.matrix import Block
from loraplex.adapters.merging.stack import Stack

#: random values that are made at once
_DRAWS: Final = 1 << 16

Bits = npt.NDArray[np.uint8]
"""``[rows, columns / 8]``."""


class Chosen(Protocol):
    """The values of a matrix that are kept."""

    def keep_(self, values: torch.Tensor, at: Block) -> None:
        """Set all others of the block to 0."""
        ...


@dataclass(frozen=True, slots=True)
class Kept:
    """Those that have a bit."""

    bits: Bits

    def keep_(self, values: torch.Tensor, at: Block) -> None:
        first, end = at.columns.start, at.columns.stop
        bits = np.unpackbits(self.bits[at.rows, first // 8 : -(-end // 8)], axis=1, count=end - first)
        values.mul_(torch.from_numpy(bits))


@dataclass(frozen=True, slots=True)
class Pruned:
    """``stack`` with only the values that are ``chosen`` of each, divided by ``share``."""

    stack: Stack
    chosen: Sequence[Chosen]
    share: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.stack.shape

    def __len__(self) -> int:
        return len(self.stack)

    def fill(self, at: Block, out: torch.Tensor) -> None:
        self.stack.fill(at, out)
        for values, chosen in zip(out, self.chosen, strict=True):
            chosen.keep_(values, at)
        if self.share != 1:
            out.div_(self.share)


def packed(chosen: npt.NDArray[np.bool_]) -> Bits:
    """Of ``[rows, columns]``."""
    return np.packbits(chosen, axis=1)


def drawn(shape: tuple[int, int], share: float, generator: torch.Generator) -> Kept:
    """About this share of the values of a matrix. The draws of PEFT's bernoulli, which takes four times as long."""
    rows, columns = shape
    bits = np.empty((rows, -(-columns // 8)), np.uint8)
    step = max(1, _DRAWS // columns)
    for first in range(0, rows, step):
        values = torch.rand(min(step, rows - first), columns, generator=generator).numpy()
        bits[first : first + step] = packed(values < np.float32(share))
    return Kept(bits)
