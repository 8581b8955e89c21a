"""Values of merged matrices, written for this processor's vectors and compiled by llvmlite when they are first needed.

A tile of each term's values is multiplied out in registers, pruned there, and left in the nearest cache until all
terms' are there and become one. So there is no memory for any of it, and a call of many values is one call, in which
Python's other threads go on.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import torch
from llvmlite import ir

from loraplex_kernels.cpu_ir import F32, I1, I64, PTR, Kernel, Value, compile_function, has_kernel, loop
from loraplex_kernels.cpu_math import I16, Numbers
from loraplex_kernels.cpu_team import read_fields
from loraplex_kernels.lanes import LANES, VECTOR_BYTES
from loraplex_kernels.merging import Election

I8, I32 = ir.IntType(8), ir.IntType(32)

#: int64 arguments of a call, in order: what is asked for, and where it goes
ARGUMENTS: Final = (
    *("terms", "num_terms", "width", "share", "first_row", "num_rows", "first_column", "num_columns", "out"),
)
#: int64 fields of a term, in order; strides are in bytes, scale, bound and weight the bits of floats, bits may be 0
TERM_FIELDS: Final = (
    *("left", "left_row", "left_step", "right", "right_row", "rank", "scale", "bound", "weight", "bits"),
)
#: rows of a tile
_ROWS: Final = 4
#: vectors of a tile's row, where there are 32 registers of 64 bytes, and where there are 16 of 32
_WIDE, _NARROW = 4, 1


@dataclass(frozen=True, slots=True)
class MergeForm:
    """What is compiled. ``has_left``: operands are products; ``divides``: by the share."""

    dtype: torch.dtype
    has_left: bool
    election: Election
    divides: bool


@functools.cache  # the code is the same each time
def compile_merge(form: MergeForm, processor: str = "") -> Kernel:
    """``merge(*ARGUMENTS)``: out, float32 and contiguous, from ``num_terms`` terms of TERM_FIELDS.

    ``width``: columns of the whole matrix, which bits are counted by; ``share``: a float's bits. The caller keeps every
    address alive and has checked every size. ``processor``: one to compile for (``compile_function``).
    """
    wide = not processor and has_kernel(torch.float32)
    return compile_function(_Merge(form, _WIDE if wide else _NARROW).module, "merge", processor)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some rows of the block, and ``vectors`` of their columns from ``column`` on; of these what is in ``mask``."""

    row: Value
    column: Value
    vectors: int
    mask: Value | None


class _Merge(Numbers):
    """The module's text: columns of the block, of these the rows, of these the terms; then vector by vector."""

    def __init__(self, form: MergeForm, vectors: int) -> None:
        super().__init__(form.dtype)
        self._form, self._item = form, form.dtype.itemsize
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [I64] * len(ARGUMENTS)), "merge")
        b = ir.IRBuilder(function.append_basic_block())
        args = dict(zip(ARGUMENTS, function.args, strict=True))
        room = b.mul(args["num_terms"], I64(_ROWS * vectors * VECTOR_BYTES))
        args["values"] = b.ptrtoint(b.alloca(I8, size=room), I64)
        args["share"] = self._float(b, args["share"])
        wide = I64(LANES * vectors)
        whole = b.udiv(args["num_columns"], wide)
        done = b.mul(whole, wide)
        left = b.sub(args["num_columns"], done)

        def one_wide(index: Value, _: list[Value]) -> list[Value]:
            self._rows(b, args, b.mul(index, wide), (vectors, None))
            return []

        def one_single(index: Value, _: list[Value]) -> list[Value]:
            first = b.mul(index, I64(LANES))
            self._rows(b, args, b.add(done, first), (1, self.tail_mask(b, b.sub(left, first))))
            return []

        loop(b, whole, (), one_wide)
        loop(b, b.udiv(b.add(left, I64(LANES - 1)), I64(LANES)), (), one_single)
        b.ret_void()

    def _float(self, b: Value, bits: Value) -> Value:
        return self.splat(b, b.bitcast(b.trunc(bits, I32), F32), LANES)

    def _rows(self, b: Value, args: dict[str, Value], column: Value, width: tuple[int, Value | None]) -> None:
        def one(index: Value, _: list[Value]) -> list[Value]:
            tile = _Tile(b.mul(index, I64(_ROWS)), column, *width)

            def term(number: Value, _: list[Value]) -> list[Value]:
                self._term(b, args, tile, number)
                return []

            loop(b, args["num_terms"], (), term)
            self._combine(b, args, tile)
            return []

        loop(b, b.udiv(b.add(args["num_rows"], I64(_ROWS - 1)), I64(_ROWS)), (), one)

    def _row(self, b: Value, args: dict[str, Value], tile: _Tile, row: Value) -> Value:
        """Of the block. Past its last one this is taken again, and what it writes is written again."""
        return self.least(b, b.add(tile.row, row), b.sub(args["num_rows"], I64(1)))

    def _value(self, b: Value, args: dict[str, Value], tile: _Tile, number: Value) -> Value:
        """Where a term's vectors of the tile are."""
        return b.inttoptr(b.add(args["values"], b.mul(number, I64(_ROWS * tile.vectors * VECTOR_BYTES))), PTR)

    def _term(self, b: Value, args: dict[str, Value], tile: _Tile, number: Value) -> None:
        """The tile's values of a term, pruned."""
        term = read_fields(b, self._place(b, args, number), TERM_FIELDS)
        rows = [b.add(args["first_row"], self._row(b, args, tile, I64(i))) for i in range(_ROWS)]
        column = b.add(args["first_column"], tile.column)
        scale, bound = (self._float(b, term[name]) for name in ("scale", "bound"))
        there = self._value(b, args, tile, number)
        for place, vector in enumerate(self._vectors(b, term, tile, rows, column)):
            b.store(vector, self.at(b, there, I64(place * VECTOR_BYTES)), align=1)

        def prune(place: Value, _: list[Value]) -> list[Value]:
            row, offset = self._row_and_offset(b, args, tile, place)
            pointer = self.at(b, there, b.mul(place, I64(VECTOR_BYTES)))
            value = b.fmul(b.load(pointer, typ=self.floats, align=1), scale)
            size = b.call(self.declare("llvm.fabs.v16f32", self.floats, self.floats), [value])
            index = b.add(b.mul(b.add(args["first_row"], row), args["width"]), b.add(column, offset))
            # a NaN is kept
            kept = b.and_(b.fcmp_unordered(">", size, bound), self._bits(b, term["bits"], index))
            value = b.select(kept, value, self.constant(0.0))
            b.store(b.fdiv(value, args["share"]) if self._form.divides else value, pointer, align=1)
            return []

        loop(b, I64(_ROWS * tile.vectors), (), prune)

    def _row_and_offset(self, b: Value, args: dict[str, Value], tile: _Tile, place: Value) -> tuple[Value, Value]:
        """Of the tile's vector at ``place``: its row of the block, and how far it is from the tile's first column."""
        row = self._row(b, args, tile, b.udiv(place, I64(tile.vectors)))
        return row, b.mul(b.urem(place, I64(tile.vectors)), I64(LANES))

    def _vectors(self, b: Value, term: dict[str, Value], tile: _Tile, rows: list[Value], column: Value) -> list[Value]:
        """Of the operand, before its scale: row by row."""
        offset = b.mul(column, I64(self._item))

        def right(row: Value) -> list[Value]:
            start = b.inttoptr(b.add(term["right"], b.add(offset, b.mul(row, term["right_row"]))), PTR)
            places = [self.at(b, start, I64(v * LANES * self._item)) for v in range(tile.vectors)]
            return [self.read(b, place, tile.mask, self.dtype) for place in places]

        if not self._form.has_left:
            return [vector for row in rows for vector in right(row)]
        lefts = [b.add(term["left"], b.mul(row, term["left_row"])) for row in rows]

        def step(k: Value, sums: list[Value]) -> list[Value]:
            vectors, new = right(k), []
            for i, left in enumerate(lefts):
                place = b.inttoptr(b.add(left, b.mul(k, term["left_step"])), PTR)
                factor = self.splat(b, self.read_one(b, place), LANES)
                new += [self.fma(b, factor, vector, sums[i * tile.vectors + v]) for v, vector in enumerate(vectors)]
            return new

        return loop(b, term["rank"], [self.constant(0.0)] * (_ROWS * tile.vectors), step)

    def _bits(self, b: Value, bits: Value, index: Value) -> Value:
        """16 bits from a value's on; all are there where there are none."""
        before, some, both = b.block, b.append_basic_block("bits"), b.append_basic_block("kept")
        b.cbranch(b.icmp_unsigned("==", bits, I64(0)), both, some)
        b.position_at_end(some)
        word = b.load(b.inttoptr(b.add(bits, b.lshr(index, I64(3))), PTR), typ=I32, align=1)
        word = b.trunc(b.lshr(word, b.trunc(b.and_(index, I64(7)), I32)), I16)
        b.branch(both)
        b.position_at_end(both)
        found = b.phi(I16)
        found.add_incoming(I16(0xFFFF), before)
        found.add_incoming(word, some)
        return b.bitcast(found, ir.VectorType(I1, LANES))

    def _combine(self, b: Value, args: dict[str, Value], tile: _Tile) -> None:
        row_bytes = b.mul(args["num_columns"], I64(4))

        def one(place: Value, _: list[Value]) -> list[Value]:
            def value(number: Value) -> Value:
                there = self.at(b, self._value(b, args, tile, number), b.mul(place, I64(VECTOR_BYTES)))
                return b.load(there, typ=self.floats, align=1)

            total = self._sum(b, args, value) if self._form.election is Election.NONE else self._elect(b, args, value)
            row, offset = self._row_and_offset(b, args, tile, place)
            column = b.add(tile.column, offset)
            out = b.add(args["out"], b.add(b.mul(row, row_bytes), b.mul(column, I64(4))))
            self.write(b, total, b.inttoptr(out, PTR), tile.mask, torch.float32)
            return []

        loop(b, I64(_ROWS * tile.vectors), (), one)

    def _place(self, b: Value, args: dict[str, Value], number: Value) -> Value:
        """Where a term's fields are."""
        return b.inttoptr(b.add(args["terms"], b.mul(number, I64(8 * len(TERM_FIELDS)))), PTR)

    def _weight(self, b: Value, args: dict[str, Value], number: Value) -> Value:
        offset = I64(8 * TERM_FIELDS.index("weight"))
        return self._float(b, b.load(self.at(b, self._place(b, args, number), offset), typ=I64))

    def _sum(self, b: Value, args: dict[str, Value], value: Value) -> Value:
        def one(number: Value, sums: list[Value]) -> list[Value]:
            return [b.fadd(sums[0], b.fmul(value(number), self._weight(b, args, number)))]

        return loop(b, args["num_terms"], [self.constant(0.0)], one)[0]

    def _elect(self, b: Value, args: dict[str, Value], value: Value) -> Value:
        zero, unit = self.constant(0.0), self.constant(1.0)

        def vote(number: Value, votes: list[Value]) -> list[Value]:
            mine = value(number)
            if self._form.election is Election.BY_NUMBER:
                positive, negative = (b.fcmp_ordered(sign, mine, zero) for sign in (">", "<"))
                mine = b.select(positive, unit, b.select(negative, self.constant(-1.0), zero))
            return [b.fadd(votes[0], mine)]

        (votes,) = loop(b, args["num_terms"], [zero], vote)
        sign = b.select(b.fcmp_ordered("<", votes, zero), self.constant(-1.0), unit)

        def count(number: Value, sums: list[Value]) -> list[Value]:
            total, voters = sums
            mine = b.fmul(value(number), sign)
            ours = b.fcmp_unordered(">", mine, zero)  # a NaN is, so that it comes out
            mine = b.select(ours, mine, zero)
            total = b.fadd(total, b.fmul(mine, self._weight(b, args, number)))
            return [total, b.fadd(voters, b.select(ours, unit, zero))]

        total, voters = loop(b, args["num_terms"], [zero, zero], count)
        voters = b.select(b.fcmp_ordered("<", voters, unit), unit, voters)
        return b.fdiv(b.fmul(total, sign), voters)
