"""One tensor of several: each pruned, weighted, and added or averaged. What a method does to values, wherever they are.

The same numbers as PEFT's ``merge_utils``, which stacks its inputs, and whose import takes seconds that a serving
process does not have: here one input at a time is added to a few running sums.

Source: peft 0.21 utils/merge_utils.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from loraplex.adapters.merging.largest import largest
from loraplex.adapters.merging.methods import Method, Pruning
from loraplex.adapters.merging.scratch import Scratch


@dataclass(frozen=True, slots=True)
class Combination:
    """How tensors of one shape become one. ``generator`` draws what random pruning keeps, in the order of the tensors;
    its state goes on from one call to the next."""

    method: Method
    density: float
    majority_sign_method: str
    generator: torch.Generator
    scratch: Scratch = field(default_factory=Scratch)

    @property
    def is_sum(self) -> bool:
        """Whether it is the plain weighted sum."""
        return self.method.pruning is Pruning.NONE and not self.method.elects

    def of(self, tensors: Iterable[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        """A new tensor, float32, of the shape that all of ``tensors`` (float32, one or more) have. Each is asked for
        when nothing more is done with the one before it."""
        kept = (self._pruned(tensor) for tensor in tensors)
        return self._elected(kept, weights) if self.method.elects else self._summed(kept, weights)

    def _pruned(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` with some of its values set to 0; where all are kept, itself."""
        if self.method.pruning is Pruning.NONE or self.density >= 1:
            return tensor
        pruned = self.scratch.like("pruned", tensor)
        if self.method.pruning is Pruning.MAGNITUDE:
            return largest(tensor, int(self.density * tensor.numel()), pruned)
        # the draws of PEFT's bernoulli, which takes four times as long
        kept = torch.rand(tensor.shape, generator=self.generator, out=pruned).lt_(self.density)
        return kept.mul_(tensor).div_(self.density)

    def _summed(self, tensors: Iterable[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        total: torch.Tensor | None = None
        for tensor, weight in zip(tensors, weights, strict=True):
            # rounded before it is added, as PEFT does: the signs of singular vectors hang on the last bit
            if total is None:
                total = tensor * weight
            else:
                total += torch.mul(tensor, weight, out=self.scratch.like("weighted", tensor))
        assert total is not None
        return total

    def _elected(self, tensors: Iterable[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        """Value by value the mean of the weighted inputs that have the majority's sign, which is taken before weights
        are; a tie is positive, and 0 has no sign."""
        # float32 throughout: torch is several times slower where booleans are among the tensors
        votes: torch.Tensor | None = None
        for tensor, weight in zip(tensors, weights, strict=True):
            if votes is None:
                negative = torch.zeros_like(tensor)
                votes, positive, positives, negatives = (
                    self.scratch.like(use, tensor).zero_() for use in ("votes", "positive", "positives", "negatives")
                )
                part = self.scratch.like("weighted", tensor)
            votes += tensor if self.majority_sign_method == "total" else torch.sign(tensor, out=part)
            positives += torch.gt(tensor, 0, out=part)
            positive += torch.clamp_min(tensor, 0, out=part).mul_(weight)
            negatives += torch.lt(tensor, 0, out=part)
            negative += torch.clamp_max(tensor, 0, out=part).mul_(weight)
        assert votes is not None
        is_positive = votes.ge_(0)  # 1 or 0, with which lerp takes one of the two as it is
        return negative.lerp_(positive, is_positive).div_(negatives.lerp_(positives, is_positive).clamp_min_(1))
