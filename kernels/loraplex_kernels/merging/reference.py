"""The contract in operations of torch and NumPy: where there is no compiled kernel, and what kernels are held to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from loraplex_kernels.merging import (
    BITS_PADDING,
    Bits,
    Combined,
    Draws,
    Election,
    Operand,
    Piece,
    Pieces,
    Place,
    Rule,
    Term,
)

#: random values that are made at once; a multiple of 8
_DRAWS: Final = 1 << 16
#: values of an operand that are looked through at once, about
_VALUES: Final = 1 << 17
_ONE: Final = torch.ones(())


class ReferenceMerging:
    """Products as torch multiplies them, which PEFT's are to the bit: singular vectors' signs hang on it."""

    name = "reference"

    def combined(self, terms: Sequence[Term], rule: Rule) -> Combined:
        return _Combined(tuple(terms), rule)

    def gathered(self, operand: Operand, low: float, high: float) -> tuple[int, torch.Tensor]:
        below, between = 0, [torch.empty(0)]
        rows, columns = operand.shape
        step = max(1, _VALUES // max(1, columns))
        for first in range(0, rows, step):
            sizes = _of(operand, (slice(first, min(first + step, rows)), slice(0, columns))).abs_().reshape(-1).numpy()
            chosen = sizes >= low
            below += len(sizes) - int(np.count_nonzero(chosen))
            chosen &= sizes <= high
            between.append(torch.from_numpy(np.compress(chosen, sizes)))
        return below, torch.cat(between)

    def draws(self, seed: int) -> Draws:
        return _Draws(torch.Generator().manual_seed(seed))

    def pieces(self, pieces: Sequence[Piece]) -> Pieces:
        return _Pieces(tuple(pieces))


@dataclass(frozen=True, slots=True)
class _Pieces:
    pieces: Sequence[Piece]

    def add_product(
        self, block: torch.Tensor, to: torch.Tensor, *, share: float = 1.0, of: float = 0.0, factor: float = 1.0
    ) -> torch.Tensor:
        to = to.mul_(share) if share else to.zero_()
        if of:
            to.add_(block, alpha=of)
        for piece in self.pieces:
            rows, columns = piece.values.shape
            ours = block[piece.column : piece.column + columns]
            to[piece.row : piece.row + rows].addmm_(piece.values, ours, alpha=factor)
        return to


@dataclass(frozen=True, slots=True)
class _Draws:
    generator: torch.Generator

    def bits(self, count: int, share: float) -> Bits:
        bits = np.zeros(-(-count // 8) + BITS_PADDING, np.uint8)
        for first in range(0, count, _DRAWS):
            values = torch.rand(min(_DRAWS, count - first), generator=self.generator).numpy()
            drawn = np.packbits(values < np.float32(share), bitorder="little")
            bits[first // 8 : first // 8 + len(drawn)] = drawn
        return bits

    def later(self, count: int) -> Draws:
        ours = _Draws(self.generator.clone_state())
        for first in range(0, count, _DRAWS):
            torch.rand(min(_DRAWS, count - first), generator=self.generator)
        return ours


@dataclass(frozen=True, slots=True)
class _Combined:
    terms: tuple[Term, ...]
    rule: Rule

    @property
    def shape(self) -> tuple[int, int]:
        return self.terms[0].operand.shape

    def fill(self, at: Place, out: torch.Tensor) -> None:
        values = torch.stack([self._values(term, at) for term in self.terms])
        weights = torch.tensor([term.weight for term in self.terms])
        if self.rule.election is Election.NONE:
            # rounded before it is added, as PEFT does: the signs of singular vectors hang on the last bit
            torch.sum(values.mul_(weights.view(-1, 1, 1)), 0, out=out)
            return
        # float32 throughout: torch is several times slower where booleans are among the tensors
        votes = torch.sum(values if self.rule.election is Election.BY_SIZE else values.sign(), 0)
        sign = torch.copysign(_ONE, votes, out=votes)  # a sum that is 0 is a positive one, if any value is not
        ours = values.mul_(sign).relu_()  # the sizes of what the majority has; all else is 0
        torch.mm(weights.unsqueeze(0), ours.flatten(1), out=out.view(1, -1))
        out.mul_(sign)
        out.div_(torch.sum(ours.gt_(0), 0, out=sign).clamp_min_(1))

    def _values(self, term: Term, at: Place) -> torch.Tensor:
        values = _of(term.operand, at)
        if term.bound >= 0:
            values = torch.hardshrink(values, term.bound)
        if term.bits is not None:
            values.mul_(_chosen(term.bits, self.shape, at))
        return values if self.rule.share == 1 else values.div_(self.rule.share)


def _of(operand: Operand, at: Place) -> torch.Tensor:
    """A block of an operand, in memory of its own."""
    rows, columns = at
    if operand.left is None:
        return operand.right[at].float() * operand.scale
    left, right = operand.left[rows].float(), operand.right[:, columns].float()
    if math.frexp(operand.scale)[0] == 0.5:  # a power of two may as well come before the product as after
        return (left * operand.scale) @ right
    return (left @ right).mul_(operand.scale)


def _chosen(bits: Bits, shape: tuple[int, int], at: Place) -> torch.Tensor:
    """1 and 0, uint8."""
    rows, columns = at
    _, width = shape
    first, last = rows.start * width, rows.stop * width
    before = first % 8
    unpacked = np.unpackbits(bits[first // 8 : -(-last // 8)], bitorder="little")[before : before + last - first]
    return torch.from_numpy(np.ascontiguousarray(unpacked.reshape(-1, width)[:, columns]))
