"""One matrix of several: each pruned, weighted, and added or averaged. What a method does to values, wherever they are.

The same numbers as PEFT's ``merge_utils``, which stacks its inputs, and whose import takes seconds that a serving
process does not have: here a block of each input is there at a time.

Source: peft 0.21 utils/merge_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from loraplex.adapters.merging.kept import Pruned, drawn
from loraplex.adapters.merging.largest import largest
from loraplex.adapters.merging.matrix import Block, Input, Matrix
from loraplex.adapters.merging.methods import Method, Pruning
from loraplex.adapters.merging.stack import Stack, stacked

_ONE = torch.ones(())


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

    def begin(self, matrices: Sequence[Input], weights: Sequence[float]) -> Callable[[], Matrix]:
        """One or more. What is random is drawn now, what is pruned is found when the rest is called, and all else is
        done where values are asked for."""
        pruning = self.method.pruning if self.density < 1 else Pruning.NONE
        stack = stacked(matrices)
        if pruning is Pruning.RANDOM:
            random = [drawn(stack.shape, self.density, self.generator) for _ in matrices]
            return lambda: self._combined(Pruned(stack, random, self.density), weights)
        if pruning is Pruning.MAGNITUDE:
            count = int(self.density * math.prod(matrices[0].shape))
            return lambda: self._combined(Pruned(stack, [largest(each, count) for each in matrices]), weights)
        return lambda: self._combined(stack, weights)

    def _combined(self, stack: Stack, weights: Sequence[float]) -> Matrix:
        if self.method.elects:
            return _Election(stack, torch.tensor([weights]), by_size=self.majority_sign_method == "total")
        return _Sum(stack, torch.tensor(weights).view(-1, 1, 1))


@dataclass(frozen=True, slots=True)
class _Sum:
    """The weighted sum. ``weights`` ``[n, 1, 1]``."""

    stack: Stack
    weights: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.stack.shape

    def fill(self, at: Block, out: torch.Tensor) -> None:
        values = torch.empty(len(self.stack), *out.shape)
        self.stack.fill(at, values)
        # rounded before it is added, as PEFT does: the signs of singular vectors hang on the last bit
        torch.sum(values.mul_(self.weights), 0, out=out)


@dataclass(frozen=True, slots=True)
class _Election:
    """Value by value the mean of the weighted inputs that have the majority's sign, which is taken before weights are;
    a tie is positive, and 0 has no sign. ``weights`` ``[1, n]``. ``by_size``: the majority is that of the sum, else of
    the number."""

    stack: Stack
    weights: torch.Tensor
    by_size: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.stack.shape

    def fill(self, at: Block, out: torch.Tensor) -> None:
        # float32 throughout: torch is several times slower where booleans are among the tensors
        values = torch.empty(len(self.stack), *out.shape)
        self.stack.fill(at, values)
        votes = torch.sum(values, 0) if self.by_size else _signs(values, out)
        sign = torch.copysign(_ONE, votes, out=votes)  # a sum that is 0 is a positive one, if any value is not
        ours = values.mul_(sign).relu_()  # the sizes of what the majority has; all else is 0
        torch.mm(self.weights, ours.flatten(1), out=out.view(1, -1))
        out.mul_(sign)
        count = torch.sum(ours.gt_(0), 0, out=sign)
        out.div_(count.clamp_min_(1))


def _signs(values: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Their sum, with room for one matrix in ``part``."""
    total = torch.sign(values[0])
    for value in values[1:]:
        total += torch.sign(value, out=part)
    return total
