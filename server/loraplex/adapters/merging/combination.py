"""One tensor of several: each pruned, weighted, and added or averaged. What a method does to values, wherever they are.

The same numbers as PEFT's ``merge_utils``, which stacks its inputs, and whose import takes seconds that a serving
process does not have: here one input at a time is added to a few running sums.

Source: peft 0.21 utils/merge_utils.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from loraplex.adapters.merging.largest import largest
from loraplex.adapters.merging.methods import Method, Pruning


@dataclass(frozen=True, slots=True)
class Combination:
    """How tensors of one shape become one. ``generator`` draws what random pruning keeps, in the order of the tensors;
    its state goes on from one call to the next."""

    method: Method
    density: float
    majority_sign_method: str
    generator: torch.Generator

    @property
    def is_sum(self) -> bool:
        """Whether it is the plain weighted sum."""
        return self.method.pruning is Pruning.NONE and not self.method.elects

    def of(self, tensors: Iterable[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        """A new tensor, float32, of the shape that all of ``tensors`` (float32, one or more) have."""
        kept = (self._pruned(tensor) for tensor in tensors)
        return self._elected(kept, weights) if self.method.elects else _summed(kept, weights)

    def _pruned(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` with some of its values set to 0; where all are kept, itself."""
        if self.method.pruning is Pruning.NONE or self.density >= 1:
            return tensor
        if self.method.pruning is Pruning.MAGNITUDE:
            return largest(tensor, int(self.density * tensor.numel()))
        # the draws of PEFT's bernoulli, which takes four times as long
        mask = torch.rand(tensor.shape, generator=self.generator).lt_(self.density)
        return mask.mul_(tensor).div_(self.density)

    def _elected(self, tensors: Iterable[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        """Value by value the mean of the weighted inputs that have the majority's sign, which is taken before weights
        are; a tie is positive, and 0 has no sign."""
        votes: torch.Tensor | None = None
        for tensor, weight in zip(tensors, weights, strict=True):
            if votes is None:
                votes = torch.zeros_like(tensor)
                positive, negative = _Side.like(tensor), _Side.like(tensor)
            votes += tensor if self.majority_sign_method == "total" else tensor.sign()
            positive.add(tensor.clamp_min(0), weight)
            negative.add(tensor.clamp_max(0), weight)
        assert votes is not None
        is_positive = votes.ge_(0)  # 1 or 0, between which lerp takes one of two as it is, faster than where
        sums = torch.lerp(negative.sums, positive.sums, is_positive)
        return sums.div_(torch.lerp(negative.counts, positive.counts, is_positive).abs_().clamp_min_(1))


@dataclass(frozen=True, slots=True)
class _Side:
    """Of each value, the inputs of one sign: their weighted sum and their number, which has that sign. All are float32:
    torch is several times slower where booleans are among the tensors."""

    sums: torch.Tensor
    counts: torch.Tensor

    @staticmethod
    def like(tensor: torch.Tensor) -> _Side:
        return _Side(torch.zeros_like(tensor), torch.zeros_like(tensor))

    def add(self, part: torch.Tensor, weight: float) -> None:
        """``part`` has no value of the other sign; it is used up."""
        self.counts.add_(part.sign())
        self.sums.add_(part.mul_(weight))


def _summed(tensors: Iterable[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total: torch.Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        # rounded before it is added, as PEFT does: the signs of singular vectors hang on the last bit
        total = tensor * weight if total is None else total.add_(tensor * weight)
    assert total is not None
    return total
