"""Rows of a tensor by runs (``shard.Runs``): taken out of a whole one, put back into one."""

from __future__ import annotations

import torch

from loraplex.parallel.shard import Runs, length


def take(whole: torch.Tensor, runs: Runs) -> torch.Tensor:
    """The rows of ``whole`` (its first dimension) in the order of ``runs``: a view where there is one run."""
    if len(runs) == 1:
        return whole[runs[0]]
    return torch.cat([whole[run] for run in runs])


def put_(whole: torch.Tensor, runs: Runs, held: torch.Tensor) -> None:
    """Write what ``take`` gave back where it came from. Rows that stand in it twice are equal."""
    start = 0
    for run in runs:
        stop = start + length(run)
        whole[run] = held[start:stop]
        start = stop


def places(runs: Runs) -> torch.Tensor:
    """Where each row of ``take`` comes from, int64 ``[length(runs)]``."""
    return torch.cat([torch.arange(run.start, run.stop) for run in runs])
