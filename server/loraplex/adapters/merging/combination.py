"""One matrix of several: each pruned, weighted, and added or averaged. What a method does to values, wherever they are.

The same numbers as PEFT's ``merge_utils``, which stacks its inputs, and whose import takes seconds that a serving
process does not have: here what is asked for is computed (``loraplex_kernels/merging``), and nothing is stacked.

Source: peft 0.21 utils/merge_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loraplex.adapters.merging.largest import largest
from loraplex.adapters.merging.matrix import Matrix
from loraplex.adapters.merging.methods import Method, Pruning
from loraplex_kernels.merging import Draws, Election, MergingBackend, Operand, Rule, Term


@dataclass(frozen=True, slots=True)
class Combination:
    """How matrices of one shape become one. ``draws`` say what random pruning keeps, in the order of the matrices, and
    go on from one call to the next."""

    method: Method
    density: float
    majority_sign_method: str
    draws: Draws
    backend: MergingBackend

    def begin(self, operands: Sequence[Operand], weights: Sequence[float]) -> Callable[[], Matrix]:
        """One or more. It is settled now which random values they have, what is pruned is found when the rest is
        called, and all else is done where values are asked for."""
        if len({operand.right.dtype for operand in operands}) > 1:
            operands = [_in_float32(operand) for operand in operands]
        terms = [Term(operand, weight) for operand, weight in zip(operands, weights, strict=True)]
        count, pruning = math.prod(operands[0].shape), self.method.pruning if self.density < 1 else Pruning.NONE
        if pruning is Pruning.RANDOM:
            draws = self.draws.later(count * len(terms))
            return lambda: self._combined(
                [replace(term, bits=draws.bits(count, self.density)) for term in terms], self.density
            )
        if pruning is Pruning.MAGNITUDE:
            return lambda: self._combined([largest(term, int(self.density * count), self.backend) for term in terms])
        return lambda: self._combined(terms)

    def _combined(self, terms: Sequence[Term], share: float = 1.0) -> Matrix:
        return self.backend.combined(terms, Rule(self._election, share))

    @property
    def _election(self) -> Election:
        if not self.method.elects:
            return Election.NONE
        return Election.BY_SIZE if self.majority_sign_method == "total" else Election.BY_NUMBER


def _in_float32(operand: Operand) -> Operand:
    return Operand(None if operand.left is None else operand.left.float(), operand.right.float(), operand.scale)
