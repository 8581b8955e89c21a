"""Quantizing dense matrices to nf4, fp4, int8 or fp8: at load, each while it is read, and whole ones for exports.

::

    nf4, fp4    blocks of 64 inputs; scale: the largest magnitude of the block      bitsandbytes' quantize_4bit
    int8        rows; scale: the largest magnitude of the row                       bitsandbytes' int8_vectorwise_quant
    fp8         rows; e4m3, scale: the largest magnitude of the row / 448
    fp8_blocks  128 x 128; the same of the block, for exports alone                 transformers' Fp8Quantize

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
#: rows, and columns, that share a scale
FP8_BLOCK: Final = 128
#: bitsandbytes' least divisor of a block
_LEAST: Final = 1e-38

Quantize = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""Whole rows ``[n, in]`` in float32, and columns -> these columns' codes, uint8 ``[n, columns]``, and their scales,
float32 ``[n / group_rows, groups]``, which are not finite where a weight of theirs is not."""


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
        if reason := self.why_not(matrix):
            raise UnsupportedFeature(reason, field="quantization")

    def why_not(self, matrix: Matrix) -> str:
        """Why it cannot be quantized so: its sizes; empty where it can."""
        sizes = ("inputs", matrix.in_features, self.scheme.group or 1), ("outputs", matrix.out_features, self._rows)
        for what, size, block in sizes:
            if size % block:
                return f"{matrix.name}: {size} {what} are no multiple of the {block} of a block of {self.name}"
        return ""

    def grain(self, matrix: Matrix) -> Grain:
        if self.whole_rows:
            return Grain()
        return Grain(self._rows, self.scheme.group, f"the block of {self.scheme.group}")

    def nbytes(self, matrix: Matrix) -> int | None:
        if matrix.end:
            return None
        scales = self.scheme.groups(matrix.in_features) * 4
        codes = matrix.out_features * row_bytes(matrix.in_features, self.scheme.values.bits)
        return codes + matrix.out_features // self._rows * scales

    def read(self, reader: WeightReader, slab: Slab) -> StoredMatrix:
        stored = self.blank(slab.shape, reader.dtype(slab.key))
        if self.whole_rows:
            self._fill(stored, slab.key, reader.tensor(slab.key, slab.rows), slab.cols)
        else:
            dense = reader.tensor(slab.key, slab.rows, slab.cols)
            self._fill(stored, slab.key, dense, slice(0, slab.shape[1]))
        return stored

    def quantized(self, key: str, dense: torch.Tensor) -> StoredMatrix:
        """A whole matrix ``[out, in]``. Raises InvalidModel naming ``key``: a value is not finite."""
        stored = self.blank((dense.shape[0], dense.shape[1]), dense.dtype)
        self._fill(stored, key, dense, slice(0, dense.shape[1]))
        return stored

    def blank(self, shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> StoredMatrix:
        """What a matrix of this shape and dtype becomes, without its values."""
        (rows, columns), bits = shape, self.scheme.values.bits
        codes = torch.empty(rows, row_bytes(columns, bits), dtype=torch.uint8, device=device)
        scales = torch.empty(rows // self._rows, self.scheme.groups(columns), device=device)
        return StoredMatrix(self._scheme_of(dtype), shape, codes, PlainScales(scales))

    @property
    def _rows(self) -> int:
        return self.scheme.group_rows

    def _fill(self, stored: StoredMatrix, key: str, dense: torch.Tensor, mine: slice) -> None:
        """Codes and scales of the columns ``mine`` of whole rows."""
        codes, [scales], bits = stored.codes, stored.scales.tensors, self.scheme.values.bits

        def quantize(some: slice) -> None:
            blocks = slice(some.start // self._rows, some.stop // self._rows)
            found, scales[blocks] = self.quantize(dense[some].to("cpu", torch.float32), mine)
            codes[some] = pack(found, bits)

        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(quantize, _runs(dense.shape[0], dense.shape[1], self._rows)))
        if not bool(torch.isfinite(scales).all()):
            raise InvalidModel(f"tensor {key!r} is not finite everywhere, and cannot be quantized")

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


def fp8_blocks() -> AtLoad:
    """e4m3 in blocks of 128 by 128, which is how checkpoints of fp8 are published."""
    return AtLoad("fp8", Scheme(Values.E4M3, FP8_BLOCK, FP8_BLOCK), _to_e4m3_blocks)


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


def _to_e4m3_blocks(rows: torch.Tensor, cols: slice) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = rows[:, cols].reshape(len(rows) // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK)  # [m, 128, n, 128]
    largest = blocks.abs().amax((1, 3))
    forward = _LARGEST_E4M3 / largest
    scale = 1.0 / forward
    # of a block of zeros, and of one too small for float32 to tell from it
    nothing = forward.isinf()
    forward[nothing], scale[nothing] = 0.0, 1.0
    scaled = (blocks * forward[:, None, :, None]).clamp_(-_LARGEST_E4M3, _LARGEST_E4M3)
    codes = scaled.flatten(2).flatten(0, 1).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, scale


def _runs(rows: int, columns: int, block: int) -> Iterator[slice]:
    """Rows of about ``_CHUNK`` weights at a time, whole blocks of them."""
    step = max(_CHUNK // columns // block, 1) * block
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))
