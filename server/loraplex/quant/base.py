"""The seams of weight storage: where tensors are read from, how a checkpoint stores matrices, what a matrix can do.

A format says which tensors stand for a matrix, where it may be cut, and reads what a rank holds of it into the one
stored form that our kernels multiply (``loraplex_kernels.quant``); layers see ``Weight`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex.parallel.shard import length
from loraplex_kernels.quant.stored import StoredMatrix

#: a slice that takes everything
WHOLE = slice(None)


class WeightReader(Protocol):
    """Tensors by checkpoint name, read one at a time."""

    def keys(self) -> frozenset[str]: ...

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the whole tensor; reads no data."""
        ...

    def dtype(self, key: str) -> torch.dtype:
        """The type that ``tensor`` gives it in; reads no data."""
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
        """The matrix as a dense tensor ``[out, in]``, exactly the values that matmul multiplies by. Read-only: it may
        be the weight itself."""
        ...


class Rows(Protocol):
    """A matrix ``[V, H]`` whose rows are looked up: an embedding."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def nbytes(self) -> int: ...

    def look_up(self, indices: torch.Tensor) -> torch.Tensor:
        """``[T]`` int64, each below V -> a new ``[T, H]``."""
        ...

    def dequantize(self) -> torch.Tensor:
        """The matrix as a dense tensor ``[V, H]``. Read-only: it may be the weight itself."""
        ...


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix ``[out, in]`` of the model, by its module's name: model.layers.0.self_attn.q_proj.

    ``end``: it stands at an end of the vocabulary, where formats leave matrices dense unless they say otherwise.
    ``bias``: its module has one, which is dense.
    """

    name: str
    out_features: int
    in_features: int
    end: bool = False
    bias: bool = False

    @property
    def key(self) -> str:
        """The checkpoint's name of its dense tensor."""
        return f"{self.name}.weight"


@dataclass(frozen=True, slots=True)
class Slab:
    """A rectangle of a matrix: ``rows`` of the outputs by ``cols`` of the inputs, both ends set."""

    matrix: Matrix
    rows: slice
    cols: slice

    @property
    def shape(self) -> tuple[int, int]:
        return length(self.rows), length(self.cols)

    @property
    def key(self) -> str:
        """The checkpoint's name of its dense tensor."""
        return self.matrix.key


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model's tensors live and in which floating type it computes."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Expected:
    """What a stored tensor must be. ``shape`` None: any. ``dtypes`` empty: any floating type."""

    shape: tuple[int, ...] | None
    dtypes: tuple[torch.dtype, ...] = ()
    required: bool = True


@dataclass(frozen=True, slots=True)
class Grain:
    """What a cut must be a multiple of; ``why`` is for people: "group_size 128"."""

    rows: int = 1
    cols: int = 1
    why: str = ""


class QuantFormat(Protocol):
    """How one checkpoint stores its matrices, read from its configuration once."""

    @property
    def name(self) -> str:
        """What people are told: gptq-int4-g128."""
        ...

    def holds(self, matrix: Matrix, keys: frozenset[str]) -> bool:
        """Whether the matrix is stored in this form in a checkpoint with these tensors; if not, it is dense."""
        ...

    def tensors(self, matrix: Matrix, keys: frozenset[str]) -> Mapping[str, Expected]:
        """The tensors that stand for a matrix that it holds."""
        ...

    def check(self, matrix: Matrix, reader: WeightReader) -> None:
        """Look into small tensors of a matrix that it holds, whose shapes are right, before any memory is taken.

        Raises InvalidModel or UnsupportedFeature naming the tensor.
        """
        ...

    def grain(self, matrix: Matrix) -> Grain:
        """Where the matrix may be cut."""
        ...

    def nbytes(self, matrix: Matrix) -> int | None:
        """Bytes that the matrix takes in memory; None when it is expected to be dense. For estimates: no tensor has
        been looked at."""
        ...

    def read(self, reader: WeightReader, slab: Slab) -> StoredMatrix:
        """The slab on the host, in memory of its own. Raises InvalidModel for values that cannot be."""
        ...
