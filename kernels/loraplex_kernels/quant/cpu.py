"""Products with quantized matrices on a CPU: compiled kernels that decode in registers (``cpu_kernel.py``).

Where no kernel can be compiled (no AVX-512, float16, a form that none is written for) a matrix is decoded by torch,
some rows at a time, for every product: right, and slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch.nn import functional as F

from loraplex_kernels.quant import QuantMatrix
from loraplex_kernels.quant.packing import RUN
from loraplex_kernels.quant.reference import ReferenceMatrix
from loraplex_kernels.quant.stored import ROW_STEP, StoredMatrix, decode

if TYPE_CHECKING:
    from loraplex_kernels.cpu_ir import Kernel
    from loraplex_kernels.quant.cpu_decode import Form

#: rows of x that a kernel multiplies by weights while these are in registers
TILE_ROWS: Final = 8
#: bytes of weights that a thread decodes at a time for more rows of x
_BLOCK_BYTES: Final = 64 << 10
#: and that torch decodes
_TILE_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class _Target:
    """What kernels are compiled for."""

    dtype: torch.dtype
    processor: str


@dataclass(frozen=True, slots=True)
class _Compiled:
    """Neighbouring parts of one form. ``table`` keeps what the kernel reads their addresses from, at ``address``."""

    product: Kernel
    form: Form
    parts: tuple[StoredMatrix, ...]
    table: np.ndarray
    address: int
    first: int  # column of y
    rows: int

    def takes(self, part: StoredMatrix) -> bool:
        """Whether one call can do ``part`` too."""
        from loraplex_kernels.quant.cpu_decode import form_of

        mine, theirs = self.parts[0].order, part.order
        same = mine is theirs or (mine is not None and theirs is not None and torch.equal(mine, theirs))
        return same and form_of(part) == self.form


@dataclass(frozen=True, slots=True)
class _Plain:
    """A part that no kernel is written for."""

    part: StoredMatrix
    first: int

    @property
    def rows(self) -> int:
        return self.part.shape[0]


class CpuMatrix(ReferenceMatrix):
    """Stacked parts, neighbours of one form in one call. Its products alone are not the reference's."""

    def __init__(self, parts: Sequence[StoredMatrix], dtype: torch.dtype, target: _Target | None) -> None:
        super().__init__(parts, dtype)
        self._runs = -(-self.shape[1] // RUN)
        row_bytes = self._runs * RUN * dtype.itemsize
        #: rows of W that a thread decodes at a time, an even number, and their bytes
        self._block = max(_BLOCK_BYTES // row_bytes // 2, 1) * 2
        self._block_bytes = self._block * row_bytes
        self._pieces = _pieces(parts, target)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows, out = len(x), self.shape[0]
        if x.shape[1] != self.shape[1] or x.dtype is not self._dtype:
            raise ValueError(f"x is {x.dtype} {list(x.shape)}, expected {self._dtype} of {self.shape[1]} columns")
        if bias is not None and (bias.dtype is not self._dtype or not bias.is_contiguous() or len(bias) != out):
            raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}, expected {self._dtype} [{out}] in one piece")
        y = x.new_empty(rows, out)
        if rows == 0:
            return y
        for piece in self._pieces:
            if isinstance(piece, _Compiled):
                order = piece.parts[0].order
                self._product(piece, self._whole_runs(x if order is None else x.index_select(1, order)), y, bias)
            else:
                own = None if bias is None else bias[piece.first : piece.first + piece.rows]
                self._by_torch(piece, x, y, own)
        return y

    def _whole_runs(self, x: torch.Tensor) -> torch.Tensor:
        """x with columns of zeros up to the end of the codes' last run, rows in one piece."""
        missing = self._runs * RUN - x.shape[1]
        if missing:
            return F.pad(x, (0, missing))
        return x if x.stride(1) == 1 else x.contiguous()

    def _product(self, piece: _Compiled, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> None:
        item, skipped, threads = x.itemsize, piece.first * x.itemsize, torch.get_num_threads()
        scratch = torch.empty(threads * self._block_bytes, dtype=torch.uint8) if len(x) > TILE_ROWS else None
        piece.product(
            piece.address,
            len(piece.parts),
            piece.rows,
            self._runs,
            x.data_ptr(),
            x.stride(0) * item,
            len(x),
            y.data_ptr() + skipped,
            y.stride(0) * item,
            0 if bias is None else bias.data_ptr() + skipped,
            threads,
            0 if scratch is None else scratch.data_ptr(),
            self._block,
        )

    def _by_torch(self, piece: _Plain, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> None:
        step = max(_TILE_BYTES // (4 * self.shape[1]) // ROW_STEP, 1) * ROW_STEP
        for start in range(0, piece.rows, step):
            stop = min(start + step, piece.rows)
            weights = decode(piece.part.rows(start, stop), self._dtype)
            own = None if bias is None else bias[start:stop]
            y[:, piece.first + start : piece.first + stop] = F.linear(x, weights, own)


def _pieces(parts: Sequence[StoredMatrix], target: _Target | None) -> tuple[_Compiled | _Plain, ...]:
    """Neighbours of one form and one order of columns together, each with the column of y where it begins."""
    pieces: list[_Compiled | _Plain] = []
    first = 0
    for part in parts:
        last = pieces[-1] if pieces else None
        if isinstance(last, _Compiled) and last.takes(part):
            assert target is not None
            pieces[-1] = _compiled((*last.parts, part), last.first, target) or last
        else:
            pieces.append((_compiled((part,), first, target) if target else None) or _Plain(part, first))
        first += part.shape[0]
    return tuple(pieces)


def _compiled(parts: tuple[StoredMatrix, ...], first: int, target: _Target) -> _Compiled | None:
    """Parts of one form, ready to be multiplied; None when no kernel is written for it."""
    from loraplex_kernels.quant.cpu_decode import fields_of, form_of
    from loraplex_kernels.quant.cpu_kernel import compile_product

    form = form_of(parts[0])
    if form is None:
        return None
    fields, column = [], 0
    for part in parts:
        fields.append(fields_of(part, column))
        column += part.shape[0]
    product = compile_product(target.dtype, form, target.processor)
    table = np.array(fields, dtype=np.int64)
    return _Compiled(product, form, parts, table, table.ctypes.data, first, column)


class CpuQuant:
    """The backend for CPU tensors."""

    name = "cpu"

    def __init__(self, *, compiled: bool = True, processor: str = "") -> None:
        """``compiled=False`` leaves everything to torch, as on a processor that has no kernel; ``processor`` is one
        without AVX-512 to compile float32 products for, by LLVM's name."""
        self._compiled = compiled
        self._processor = processor

    def matrix(self, parts: Sequence[StoredMatrix], dtype: torch.dtype) -> QuantMatrix:
        from loraplex_kernels.quant.cpu_kernel import can_compile

        compiled = self._compiled and can_compile(dtype) and (dtype is torch.float32 or not self._processor)
        return CpuMatrix(parts, dtype, _Target(dtype, self._processor) if compiled else None)


def available(device: torch.device) -> str | None:
    """Why this backend cannot run on the device; None when it can."""
    if device.type != "cpu":
        return f"it runs on cpu tensors, the device is {device}"
    return None if find_spec("llvmlite") else "the package llvmlite is not installed"
