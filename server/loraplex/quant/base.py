"""The seams of weight storage: where tensors are read from, and what a stored matrix can do.

A format owns how it stores, slices and multiplies a matrix; layers see ``Weight`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

#: a slice that takes everything
WHOLE = slice(None)


class WeightReader(Protocol):
    """Tensors by checkpoint name, read one at a time."""

    def keys(self) -> frozenset[str]: ...

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the whole tensor; reads no data."""
        ...

    def tensor(self, key: str, rows: slice = WHOLE, cols: slice = WHOLE) -> torch.Tensor:
        """The tensor, cut along its first and second dimension (``cols`` is for matrices only).

        The result may view the file: whoever keeps it copies it. Raises InvalidModel when the data cannot be read.
        """
        ...


class Weight(Protocol):
    """A matrix ``[out, in]`` in some stored form."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def nbytes(self) -> int: ...

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ W.T + bias``: ``[T, in]`` -> a new contiguous ``[T, out]`` of x's dtype; T may be 0."""
        ...

    def dequantize(self) -> torch.Tensor:
        """The matrix as a new dense tensor ``[out, in]``, exactly the values that matmul multiplies by."""
        ...


@dataclass(frozen=True, slots=True)
class Slab:
    """A rectangle of one checkpoint matrix: ``rows`` of the outputs by ``cols`` of the inputs, both ends set."""

    key: str  # model.layers.0.self_attn.q_proj.weight
    rows: slice
    cols: slice


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model's tensors live and in which floating type it computes."""

    device: torch.device
    dtype: torch.dtype


class QuantFormat(Protocol):
    """One way of storing matrices. Registered once; chosen once per model."""

    name: str

    def matches(self, config: Mapping[str, object]) -> bool:
        """Whether a checkpoint with this config.json is stored in this format."""
        ...

    def load(self, reader: WeightReader, slabs: tuple[Slab, ...], placement: Placement) -> Weight:
        """Read ``slabs``, stacked by rows in order, into one weight."""
        ...
