"""What a run of a benchmark is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.ops.shapes import OpShapes


@dataclass(frozen=True, slots=True)
class Options:
    """Which backends, where, at which sizes, how long."""

    backends: tuple[str, ...]
    """Names of the op's table, or ``auto``; each is a column."""
    device: torch.device
    dtype: torch.dtype
    shapes: OpShapes
    repeats: int = 15
    calls: int = 10
    """Least calls of a way in each repeat."""


def resolve_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one. Raises ValueError for ``cuda`` without one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds none here; must be cpu or auto")
    return torch.device(name)
