"""One rank of a group whose peers are not there: its part of a model, loaded as in a group, but with no sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loraplex.models.assemble import Runtime
from loraplex.models.base import BaseModel
from loraplex.models.loader import ModelPlan, load_model
from loraplex_kernels.attention.reference import ReferenceAttention
from loraplex_kernels.lora.reference import ReferenceLora


@dataclass(frozen=True, slots=True)
class LonelyRank:
    """A group (``TPGroup``) for tests that bring together by themselves what each rank made."""

    rank: int
    size: int

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor


def load_part(plan: ModelPlan, rank: int, size: int) -> BaseModel:
    """What ``rank`` of ``size`` holds of a planned model."""
    runtime = Runtime(ReferenceLora(), ReferenceAttention(), 1 << 20, LonelyRank(rank, size))
    return load_model(plan, runtime, lambda done, total: None)
