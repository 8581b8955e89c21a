"""Products of a matrix that is there in pieces with a few columns, compiled by llvmlite when it is first needed.

Pieces are read as they lie, rows and columns alike. Tiles of some rows and 16 columns are summed in registers over a
stretch of the matrix's columns for which the block's rows stay in the nearest cache. A product is one call, in which
Python's other threads go on.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from llvmlite import ir

from loraplex_kernels.cpu_ir import F32, I32, I64, PTR, Kernel, Value, compile_function, has_kernel, loop
from loraplex_kernels.cpu_math import Numbers
from loraplex_kernels.cpu_team import read_fields
from loraplex_kernels.lanes import LANES, VECTOR_BYTES

#: int64 arguments of a call, in order; ``of``, ``share`` and ``factor`` are the bits of floats
ARGUMENTS: Final = ("pieces", "num_pieces", "num_rows", "vectors", "block", "to", "share", "of", "factor")
#: int64 fields of a piece, in order: it is multiplied by the block's rows from ``first`` on, and added to those of the
#: result from ``out`` on; strides, from row to row and from column to column, are in bytes
PIECE_FIELDS: Final = ("values", "row", "step", "num_rows", "num_columns", "first", "out")
#: of the matrix's columns
_STRETCH: Final = 96
#: rows of a tile, where there are 32 registers of 64 bytes, and where there are 16 of 32
_WIDE, _NARROW = 8, 6


@functools.cache  # the code is the same each time
def compile_pieces(processor: str = "") -> Kernel:
    """``product(*ARGUMENTS)``: ``to = share * to + of * block + factor * (matrix @ block)``.

    Block and ``to`` are float32 ``[rows, 16 * vectors]``, contiguous, ``to`` of ``num_rows``. With a share of 0 nothing
    of ``to`` is left; with an ``of`` of 0 the block may have other rows. ``processor``: as in ``compile_function``.
    """
    rows = _WIDE if not processor and has_kernel(torch.float32) else _NARROW
    return compile_function(_Product(rows).module, "product", processor)


class _Product(Numbers):
    """What is there of both first, then piece by piece, stretch by stretch, tile by tile."""

    def __init__(self, rows: int) -> None:
        super().__init__(torch.float32)
        self._rows = rows
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [I64] * len(ARGUMENTS)), "product")
        b = ir.IRBuilder(function.append_basic_block())
        args = dict(zip(ARGUMENTS, function.args, strict=True))
        args["row_bytes"] = b.mul(args["vectors"], I64(VECTOR_BYTES))
        shares = {name: b.bitcast(b.trunc(args[name], I32), F32) for name in ("share", "of", "factor")}
        self._begin(b, args, shares)
        factor = self.splat(b, shares["factor"], LANES)

        def piece(number: Value, _: list[Value]) -> list[Value]:
            there = b.inttoptr(b.add(args["pieces"], b.mul(number, I64(8 * len(PIECE_FIELDS)))), PTR)
            fields = read_fields(b, there, PIECE_FIELDS)

            def stretch(index: Value, _: list[Value]) -> list[Value]:
                first = b.mul(index, I64(_STRETCH))
                count = self.least(b, b.sub(fields["num_columns"], first), I64(_STRETCH))
                self._stretch(b, args, fields, (first, count), factor)
                return []

            loop(b, _parts(b, fields["num_columns"], _STRETCH), (), stretch)
            return []

        loop(b, args["num_pieces"], (), piece)
        b.ret_void()

    def _begin(self, b: Value, args: dict[str, Value], shares: dict[str, Value]) -> None:
        """``to = share * to + of * block``, of which a share of 0 is nothing, whatever is there."""
        count, zero = b.mul(args["num_rows"], args["vectors"]), ir.Constant(F32, 0.0)
        share, of = (self.splat(b, shares[name], LANES) for name in ("share", "of"))
        none = b.fcmp_ordered("==", shares["share"], zero)

        def place(name: str, index: Value) -> Value:
            return b.inttoptr(b.add(args[name], b.mul(index, I64(VECTOR_BYTES))), PTR)

        def keep(index: Value, _: list[Value]) -> list[Value]:
            there = place("to", index)
            kept = b.fmul(share, b.load(there, typ=self.floats, align=1))
            b.store(b.select(none, self.constant(0.0), kept), there, align=1)
            return []

        def add(index: Value, _: list[Value]) -> list[Value]:
            there, ours = place("to", index), b.load(place("block", index), typ=self.floats, align=1)
            b.store(self.fma(b, of, ours, b.load(there, typ=self.floats, align=1)), there, align=1)
            return []

        loop(b, count, (), keep)
        loop(b, b.select(b.fcmp_ordered("==", shares["of"], zero), I64(0), count), (), add)

    def _stretch(
        self,
        b: Value,
        args: dict[str, Value],
        fields: dict[str, Value],
        columns: tuple[Value, Value],
        factor: Value,
    ) -> None:
        """Add the products of some of a piece's columns, of which there is the first and the number."""
        first, count = columns
        values = b.add(fields["values"], b.mul(first, fields["step"]))
        block = b.add(args["block"], b.mul(b.add(fields["first"], first), args["row_bytes"]))
        out = b.add(args["to"], b.mul(fields["out"], args["row_bytes"]))
        whole = b.udiv(fields["num_rows"], I64(self._rows))
        done = b.mul(whole, I64(self._rows))

        def tiles(begin: Value, height: int) -> None:
            lefts = [b.add(values, b.mul(b.add(begin, I64(i)), fields["row"])) for i in range(height)]

            def group(index: Value, _: list[Value]) -> list[Value]:
                offset = b.mul(index, I64(VECTOR_BYTES))
                start = b.add(block, offset)

                def step(k: Value, sums: list[Value]) -> list[Value]:
                    there = b.inttoptr(b.add(start, b.mul(k, args["row_bytes"])), PTR)
                    vector, along = b.load(there, typ=self.floats, align=1), b.mul(k, fields["step"])
                    new = []
                    for left, total in zip(lefts, sums, strict=True):
                        number = b.load(b.inttoptr(b.add(left, along), PTR), typ=F32, align=4)
                        new.append(self.fma(b, self.splat(b, number, LANES), vector, total))
                    return new

                sums = loop(b, count, [self.constant(0.0)] * height, step)
                for i, total in enumerate(sums):
                    row = b.mul(b.add(begin, I64(i)), args["row_bytes"])
                    there = b.inttoptr(b.add(out, b.add(row, offset)), PTR)
                    b.store(self.fma(b, factor, total, b.load(there, typ=self.floats, align=1)), there, align=1)
                return []

            loop(b, args["vectors"], (), group)

        def many(index: Value, _: list[Value]) -> list[Value]:
            tiles(b.mul(index, I64(self._rows)), self._rows)
            return []

        def single(index: Value, _: list[Value]) -> list[Value]:
            tiles(b.add(done, index), 1)
            return []

        loop(b, whole, (), many)
        loop(b, b.sub(fields["num_rows"], done), (), single)


def _parts(b: Value, count: Value, length: int) -> Value:
    """How many parts of a length ``count`` has."""
    return b.udiv(b.add(count, I64(length - 1)), I64(length))
