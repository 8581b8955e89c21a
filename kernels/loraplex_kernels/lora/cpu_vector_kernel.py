"""Scales and shifts of many segments in one compiled call, in place of a library call for each of them.

A library call costs 2 to 9 us, the arithmetic of one row a tenth of that; and every vector is read where its slot
keeps it, so that nothing is laid out anew when a step's rows change.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from llvmlite import ir

from loraplex_kernels.cpu_ir import I64, PTR, Kernel, Pieces, Value, compile_function, loop
from loraplex_kernels.lanes import LANES

#: int64 fields of a tile, in the order the kernel reads them: first row, last row + 1, address of scale, of shift
TILE_FIELDS: Final = 4


@functools.cache  # the code is the same each time
def compile_vector_kernel(dtype: torch.dtype) -> Kernel:
    """``change_rows(y, y_stride, width, tiles, num_tiles)``: ``y = y * scale + shift``, rounded once.

    Addresses and strides are in bytes. tiles: int64 ``[n, TILE_FIELDS]``; scales and shifts: float32 ``[width]``. A
    scale of 1 and a shift of -0.0 keep every bit of y. The caller keeps every address alive and has checked every size.
    """
    return compile_function(_Source(dtype is torch.bfloat16).module, "change_rows")


class _Source(Pieces):
    """The module's text: tiles, their rows, and along a row the columns, in the order they lie in memory."""

    def __init__(self, bfloat16: bool) -> None:
        super().__init__(bfloat16)
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [I64] * 5), "change_rows")
        y, stride, width, tiles, num_tiles = function.args
        b = ir.IRBuilder(function.append_basic_block())

        def one_tile(t: Value, _: list[Value]) -> list[Value]:
            tile = b.gep(b.inttoptr(tiles, PTR), [b.mul(t, I64(TILE_FIELDS))], source_etype=I64)
            fields = [b.load(b.gep(tile, [I64(f)], source_etype=I64), typ=I64) for f in range(TILE_FIELDS)]
            start, stop, *vectors = fields

            def one_row(row: Value, _: list[Value]) -> list[Value]:
                here = b.add(y, b.mul(b.add(start, row), stride))
                self._change(b, b.inttoptr(here, PTR), [b.inttoptr(vector, PTR) for vector in vectors], width)
                return []

            loop(b, b.sub(stop, start), (), one_row)
            return []

        loop(b, num_tiles, (), one_tile)
        b.ret_void()

    def _change(self, b: Value, row: Value, vectors: list[Value], width: Value) -> None:
        fma = self.declare("llvm.fma.v16f32", self.sum, self.sum, self.sum, self.sum)

        def columns(block: Value, _: list[Value]) -> list[Value]:
            begin = b.mul(block, I64(LANES))
            mask = self.mask(b, begin, width, LANES)
            offset = b.mul(begin, I64(4))
            scale, shift = (self.load_masked(b, self.at(b, vector, offset), mask, self.sum) for vector in vectors)
            place = self.at(b, row, b.mul(begin, I64(self.item)))
            value = self.load_masked(b, place, mask, self.columns)
            value = b.call(fma, [b.fpext(value, self.sum) if self.bf else value, scale, shift])
            self.store_masked(b, b.fptrunc(value, self.columns) if self.bf else value, place, mask)
            return []

        loop(b, b.udiv(b.add(width, I64(LANES - 1)), I64(LANES)), (), columns)
