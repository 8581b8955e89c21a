"""Scales and shifts on a CPU: held by slot, summed over a segment's terms once for each plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex_kernels.lora import SlotDelta


@dataclass(frozen=True, slots=True)
class Vectors:
    """What a slot, or a segment, multiplies and adds, in float32; None: nothing."""

    in_scale: torch.Tensor | None  # [in]
    out_scale: torch.Tensor | None  # [sum(part_sizes)], 1 in parts that have none
    shift: torch.Tensor | None  # [sum(part_sizes)], 0 in parts that have none

    @property
    def nbytes(self) -> int:
        return sum(v.nbytes for v in (self.in_scale, self.out_scale, self.shift) if v is not None)

    def __bool__(self) -> bool:
        return self.in_scale is not None or self.out_scale is not None or self.shift is not None

    def change_(self, y: torch.Tensor) -> None:
        """``y = y * out_scale + shift``, computed in float32 and rounded once."""
        if self.out_scale is not None and self.shift is not None:
            y.copy_(torch.addcmul(self.shift, y.float(), self.out_scale))
        elif self.out_scale is not None:
            y.mul_(self.out_scale)
        elif self.shift is not None:
            y.add_(self.shift)


def pack_vectors(delta: SlotDelta, sizes: tuple[int, ...]) -> Vectors:
    """The vectors of a delta that fits a table of these part sizes, in memory of their own."""
    scales = [part and part.out_scale for part in delta.parts]
    shifts = [part and part.shift for part in delta.parts]
    in_scale = None if delta.in_scale is None else delta.in_scale.clone()
    return Vectors(in_scale, _joined(scales, sizes, 1.0), _joined(shifts, sizes, 0.0))


def summed(terms: Sequence[tuple[float, Vectors]]) -> Vectors:
    """What weighted terms come to together: ``1 + sum c (scale - 1)`` and ``sum c shift``."""
    return Vectors(
        _scale([(weight, vectors.in_scale) for weight, vectors in terms]),
        _scale([(weight, vectors.out_scale) for weight, vectors in terms]),
        _shift([(weight, vectors.shift) for weight, vectors in terms]),
    )


def _joined(vectors: list[torch.Tensor | None], sizes: tuple[int, ...], neutral: float) -> torch.Tensor | None:
    if all(vector is None for vector in vectors):
        return None
    pieces = zip(vectors, sizes, strict=True)
    return torch.cat([torch.full((size,), neutral) if vector is None else vector for vector, size in pieces])


def _scale(terms: list[tuple[float, torch.Tensor | None]]) -> torch.Tensor | None:
    changes = [weight * (scale - 1) for weight, scale in terms if scale is not None]
    return torch.stack(changes).sum(0).add_(1) if changes else None


def _shift(terms: list[tuple[float, torch.Tensor | None]]) -> torch.Tensor | None:
    shifts = [weight * shift for weight, shift in terms if shift is not None]
    return torch.stack(shifts).sum(0) if shifts else None
