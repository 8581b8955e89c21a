"""Quantizing at load: a dense checkpoint's matrices, each while it is read, to nf4, fp4, int8 or fp8.

::

    nf4, fp4    blocks of 64 inputs; scale: the largest magnitude of the block      bitsandbytes' quantize_4bit
    int8        rows; scale: the largest magnitude of the row                       bitsandbytes' int8_vectorwise_quant
    fp8         rows; e4m3, scale: the largest magnitude of the row / 448

Codes and scales are float32's, bit for bit those of the functions named, for each rank those of the whole matrix. nf4
and fp4 weights are rounded to the checkpoint's dtype before the product's own, as bitsandbytes rounds what it
dequantizes. Matrices at the ends of the vocabulary stay dense. Served weight-only: inputs stay as they are.

A matrix goes through by a few rows at a time, in as many threads as torch has for one operation: what is held is its
codes, and about 1 MiB for each thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.errors import InvalidModel, UnsupportedFeature
from loraplex.quant import bnb4, bnb8
from loraplex.quant.base import Expected, Grain, Matrix, Slab, WeightReader
from loraplex.quant.dense import DenseFormat
from loraplex_kernels.quant.packing import pack, row_bytes
from loraplex_kernels.quant.stored import PlainScales, Scheme, StoredMatrix
from loraplex_kernels.quant.values import TABLES, Values

#: weights that go through at a time: fewer than the 32768 from which torch shares an operation among threads, which on
#: busy cores takes longer than the operation
_CHUNK: Final = 32_000
_LARGEST_E4M3: Final = 448.0
#: bitsandbytes' least divisor of a block
_LEAST: Final = 1e-38

Quantize = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""Whole rows ``[n, in]`` in float32, and columns -> these columns' codes, uint8 ``[n, columns]``, and their scales,
float32 ``[n, groups]``, which are not finite where a weight of theirs is not."""


@dataclass(frozen=True, slots=True)
class AtLoad:
    """One way to quantize dense matrices (``QuantFormat``)."""

    name: str
    scheme: Scheme
    quantize: Quantize
    #: weights are rounded to the checkpoint's dtype
    rounds: bool = False

    @property
    def whole_rows(self) -> bool:
        """A scale is that of a whole row, wherever the matrix is cut."""
        return not self.scheme.group

    def holds(self, matrix: Matrix, keys: frozenset[str]) -> bool:
        return not matrix.end

    def tensors(self, matrix: Matrix, keys: frozenset[str]) -> Mapping[str, Expected]:
        return DenseFormat().tensors(matrix, keys)

    def check(self, matrix: Matrix, reader: WeightReader) -> None:
        if not self.whole_rows and matrix.in_features % self.scheme.group:
            raise UnsupportedFeature(
                f"{matrix.name}: {matrix.in_features} inputs are no multiple of the {self.scheme.group} of a block of "
                f"{self.name}",
                field="quantization",
            )

    def grain(self, matrix: Matrix) -> Grain:
        return Grain() if self.whole_rows else Grain(cols=self.scheme.group, why=f"the block of {self.scheme.group}")

    def nbytes(self, matrix: Matrix) -> int | None:
        if matrix.end:
            return None
        scales = self.scheme.groups(matrix.in_features) * 4
        return matrix.out_features * (row_bytes(matrix.in_features, self.scheme.values.bits) + scales)

    def read(self, reader: WeightReader, slab: Slab) -> StoredMatrix:
        (rows, columns), bits = slab.shape, self.scheme.values.bits
        if self.whole_rows:
            dense, mine = reader.tensor(slab.key, slab.rows), slab.cols
        else:
            dense, mine = reader.tensor(slab.key, slab.rows, slab.cols), slice(0, columns)
        codes = torch.empty(rows, row_bytes(columns, bits), dtype=torch.uint8)
        scales = torch.empty(rows, self.scheme.groups(columns))

        def quantize(some: slice) -> None:
            found, scales[some] = self.quantize(dense[some].to("cpu", torch.float32), mine)
            codes[some] = pack(found, bits)

        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(quantize, _runs(rows, dense.shape[1])))
        if not bool(torch.isfinite(scales).all()):
            raise InvalidModel(f"tensor {slab.key!r} is not finite everywhere, and cannot be quantized")
        return StoredMatrix(self._scheme_of(reader.dtype(slab.key)), slab.shape, codes, PlainScales(scales))

    def _scheme_of(self, stored: torch.dtype) -> Scheme:
        if not self.rounds or stored.itemsize > 2:
            return self.scheme
        return Scheme(self.scheme.values, self.scheme.group, rounded=stored)


def nf4() -> AtLoad:
    """bitsandbytes' nf4, in blocks of 64."""
    return _in_blocks(Values.NF4)


def fp4() -> AtLoad:
    """bitsandbytes' fp4, in blocks of 64."""
    return _in_blocks(Values.FP4)


def int8() -> AtLoad:
    """bitsandbytes' int8, by rows."""
    return AtLoad("int8", bnb8.SCHEME, _to_int8)


def fp8() -> AtLoad:
    """e4m3, by rows."""
    return AtLoad("fp8", Scheme(Values.E4M3, 0), _to_e4m3)


def _in_blocks(values: Values) -> AtLoad:
    table = torch.tensor(TABLES[values])
    # of two equal numbers the first stays first, as in bitsandbytes
    order = torch.argsort(table, stable=True)
    bounds = ((table[order[:-1]] + table[order[1:]]) / 2).unbind()
    order = order.to(torch.uint8)

    def quantize(rows: torch.Tensor, cols: slice) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = rows[:, cols].reshape(len(rows), -1, bnb4.BLOCK)
        absmax = blocks.abs().amax(2)
        scaled = (blocks * (1.0 / absmax.clamp(min=_LEAST)).unsqueeze(2)).clamp_(-1, 1).flatten(1)
        # how many bounds are below it: in the middle of two numbers the lower one is taken
        codes, above = torch.zeros(scaled.shape, dtype=torch.uint8), torch.empty(scaled.shape, dtype=torch.bool)
        for bound in bounds:
            codes += torch.gt(scaled, bound, out=above).view(torch.uint8)
        return order[codes.int()], absmax

    return AtLoad(values.value, Scheme(values, bnb4.BLOCK), quantize, rounds=True)


def _to_int8(rows: torch.Tensor, cols: slice) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = rows.abs().amax(1, keepdim=True)
    inverse = 127.0 / absmax
    # of a row of zeros, and of one too small for float32 to tell from it
    inverse[inverse.isinf()] = 0.0
    return (rows[:, cols] * inverse).round_().to(torch.int8).view(torch.uint8), absmax


def _to_e4m3(rows: torch.Tensor, cols: slice) -> tuple[torch.Tensor, torch.Tensor]:
    scale = rows.abs().amax(1, keepdim=True) / _LARGEST_E4M3
    scaled = rows[:, cols] / torch.where(scale == 0, 1.0, scale)
    # what is too small for float32 to scale exactly must not become e4m3's NaN
    return scaled.clamp_(-_LARGEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn).view(torch.uint8), scale


def _runs(rows: int, columns: int) -> Iterator[slice]:
    """Rows of about ``_CHUNK`` weights at a time."""
    step = max(_CHUNK // columns, 1)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))
