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

from loraplex_kernels.cpu_ir import I1, I32, I64, PTR, Kernel, Value, compile_function, loop
from loraplex_kernels.cpu_math import I16
from loraplex_kernels.cpu_team import read_fields
from loraplex_kernels.lanes import LANES, VECTOR_BYTES
from loraplex_kernels.merging import Election
from loraplex_kernels.merging.cpu_tiles import ROWS, TERM_FIELDS, Tile, Tiles, tile_vectors

I8 = ir.IntType(8)

#: int64 arguments of a call, in order: what is asked for, and where it goes
ARGUMENTS: Final = (
    *("terms", "num_terms", "width", "share", "first_row", "num_rows", "first_column", "num_columns", "out"),
)


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
    return compile_function(_Merge(form, tile_vectors(processor)).module, "merge", processor)


class _Merge(Tiles):
    """The module's text: of each tile the terms, then vector by vector."""

    def __init__(self, form: MergeForm, vectors: int) -> None:
        super().__init__(form.dtype, has_left=form.has_left, vectors=vectors)
        self._form = form
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [I64] * len(ARGUMENTS)), "merge")
        b = ir.IRBuilder(function.append_basic_block())
        args = dict(zip(ARGUMENTS, function.args, strict=True))
        room = b.mul(args["num_terms"], I64(ROWS * vectors * VECTOR_BYTES))
        args["values"] = b.ptrtoint(b.alloca(I8, size=room), I64)
        args["share"] = self.float_of(b, args["share"])

        def one(tile: Tile) -> None:
            def term(number: Value, _: list[Value]) -> list[Value]:
                self._term(b, args, tile, number)
                return []

            loop(b, args["num_terms"], (), term)
            self._combine(b, args, tile)

        self.over(b, args["num_rows"], args["num_columns"], one)
        b.ret_void()

    def _row(self, b: Value, args: dict[str, Value], tile: Tile, row: Value) -> Value:
        """Of the block. Past its last one this is taken again, and what it writes is written again."""
        return self.least(b, b.add(tile.row, row), b.sub(args["num_rows"], I64(1)))

    def _value(self, b: Value, args: dict[str, Value], tile: Tile, number: Value) -> Value:
        """Where a term's vectors of the tile are."""
        return b.inttoptr(b.add(args["values"], b.mul(number, I64(ROWS * tile.vectors * VECTOR_BYTES))), PTR)

    def _term(self, b: Value, args: dict[str, Value], tile: Tile, number: Value) -> None:
        """The tile's values of a term, pruned."""
        term = read_fields(b, self._place(b, args, number), TERM_FIELDS)
        rows = [b.add(args["first_row"], self._row(b, args, tile, I64(i))) for i in range(ROWS)]
        column = b.add(args["first_column"], tile.column)
        scale, bound = (self.float_of(b, term[name]) for name in ("scale", "bound"))
        there = self._value(b, args, tile, number)
        for place, vector in enumerate(self.operand(b, term, tile, rows, column)):
            b.store(vector, self.at(b, there, I64(place * VECTOR_BYTES)), align=1)

        def prune(place: Value, _: list[Value]) -> list[Value]:
            row, offset = self._row_and_offset(b, args, tile, place)
            pointer = self.at(b, there, b.mul(place, I64(VECTOR_BYTES)))
            value = b.fmul(b.load(pointer, typ=self.floats, align=1), scale)
            size = self.size(b, value)
            index = b.add(b.mul(b.add(args["first_row"], row), args["width"]), b.add(column, offset))
            # a NaN is kept
            kept = b.and_(b.fcmp_unordered(">", size, bound), self._bits(b, term["bits"], index))
            value = b.select(kept, value, self.constant(0.0))
            b.store(b.fdiv(value, args["share"]) if self._form.divides else value, pointer, align=1)
            return []

        loop(b, I64(ROWS * tile.vectors), (), prune)

    def _row_and_offset(self, b: Value, args: dict[str, Value], tile: Tile, place: Value) -> tuple[Value, Value]:
        """Of the tile's vector at ``place``: its row of the block, and how far it is from the tile's first column."""
        row = self._row(b, args, tile, b.udiv(place, I64(tile.vectors)))
        return row, b.mul(b.urem(place, I64(tile.vectors)), I64(LANES))

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

    def _combine(self, b: Value, args: dict[str, Value], tile: Tile) -> None:
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

        loop(b, I64(ROWS * tile.vectors), (), one)

    def _place(self, b: Value, args: dict[str, Value], number: Value) -> Value:
        """Where a term's fields are."""
        return b.inttoptr(b.add(args["terms"], b.mul(number, I64(8 * len(TERM_FIELDS)))), PTR)

    def _weight(self, b: Value, args: dict[str, Value], number: Value) -> Value:
        offset = I64(8 * TERM_FIELDS.index("weight"))
        return self.float_of(b, b.load(self.at(b, self._place(b, args, number), offset), typ=I64))

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
