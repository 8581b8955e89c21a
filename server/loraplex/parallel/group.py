"""The ranks a model is cut over, and the two collectives layers need. Knows nothing of what is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class TPGroup(Protocol):
    """A group of ranks that hold slices of one model."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over the ranks, in place; returns it."""
        ...

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Concatenate every rank's ``tensor`` along ``dim``, in rank order."""
        ...


@dataclass(frozen=True, slots=True)
class SoloGroup:
    """The group of one rank: nothing is cut, the collectives are the identity."""

    rank: int = 0
    size: int = 1

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor


def solo() -> TPGroup:
    """The group of a server without tensor parallelism."""
    return SoloGroup()
