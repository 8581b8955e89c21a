"""One matrix of several: each pruned, weighted, and added or averaged. What a method does to values, wherever they are.

The same numbers as PEFT's ``merge_utils``, which stacks its inputs, and whose import takes seconds that a serving
process does not have: here a block of each input is there at a time.

Source: peft 0.21 utils/merge_utils.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex.adapters.merging.kept import Kept, drawn
from loraplex.adapters.merging.largest import Largest
from loraplex.adapters.merging.matrix import Block, Matrix
from loraplex.adapters.merging.methods import Method, Pruning


@dataclass(frozen=True, slots=True)
class Combination:
    """How matrices of one shape become one. ``generator`` draws what random pruning keeps, in the order of the
    matrices; its state goes on from one call to the next."""

    method: Method
    density: float
    majority_sign_method: str
    generator: torch.Generator

    @property
    def is_sum(self) -> bool:
        """Whether it is the plain weighted sum."""
        return self.method.pruning is Pruning.NONE and not self.method.elects

    def of(self, matrices: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
        """One or more. What is random is drawn now; all else is done when blocks are asked for."""
        kept = self._pruned(matrices)
        if self.method.elects:
            return _Election(kept, weights, by_size=self.majority_sign_method == "total")
        return _Sum(kept, weights)

    def _pruned(self, matrices: Sequence[Matrix]) -> Sequence[Matrix]:
        """With some of their values set to 0; where all are kept, themselves."""
        if self.method.pruning is Pruning.NONE or self.density >= 1:
            return matrices
        rows, columns = matrices[0].shape
        if self.method.pruning is Pruning.MAGNITUDE:
            return [Largest(each, int(self.density * rows * columns)) for each in matrices]
        return [Kept(each, drawn(each.shape, self.density, self.generator), self.density) for each in matrices]


@dataclass(frozen=True, slots=True)
class _Sum:
    """The weighted sum."""

    matrices: Sequence[Matrix]
    weights: Sequence[float]

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrices[0].shape

    def block(self, at: Block) -> torch.Tensor:
        # rounded before it is added, as PEFT does: the signs of singular vectors hang on the last bit
        first, *others = zip(self.matrices, self.weights, strict=True)
        total = first[0].block(at) * first[1]
        for matrix, weight in others:
            total += matrix.block(at) * weight
        return total


@dataclass(frozen=True, slots=True)
class _Election:
    """Value by value the mean of the weighted inputs that have the majority's sign, which is taken before weights are;
    a tie is positive, and 0 has no sign. ``by_size``: the majority is that of the sum, else of the number."""

    matrices: Sequence[Matrix]
    weights: Sequence[float]
    by_size: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrices[0].shape

    def block(self, at: Block) -> torch.Tensor:
        # float32 throughout: torch is several times slower where booleans are among the tensors
        values = [matrix.block(at) for matrix in self.matrices]
        votes = values[0].clone() if self.by_size else torch.sign(values[0])
        part = torch.empty_like(votes)
        for value in values[1:]:
            votes += value if self.by_size else torch.sign(value, out=part)
        sign = votes.ge_(0).mul_(2).sub_(1)
        total, count = torch.zeros_like(sign), torch.zeros_like(sign)
        for value, weight in zip(values, self.weights, strict=True):
            size = torch.mul(value, sign).relu_()  # of the majority; of all else 0
            count += torch.gt(size, 0, out=part)
            total += size.mul_(weight)
        return total.mul_(sign).div_(count.clamp_min_(1))
