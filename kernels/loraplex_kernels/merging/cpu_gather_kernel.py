"""Looking through all values of an operand, which are nowhere but in registers; compiled by llvmlite when it is first
needed."""

from __future__ import annotations

import functools
from typing import Final

import torch
from llvmlite import ir

from loraplex_kernels.cpu_ir import F32, I1, I64, PTR, Kernel, Value, compile_function, loop
from loraplex_kernels.cpu_math import I16
from loraplex_kernels.cpu_team import read_fields
from loraplex_kernels.lanes import LANES, VECTOR_BYTES
from loraplex_kernels.merging.cpu_tiles import ROWS, TERM_FIELDS, Tile, Tiles, tile_vectors

I8 = ir.IntType(8)

#: int64 arguments of a call, in order: what is looked through, and where what is found goes
ARGUMENTS: Final = ("term", "num_rows", "num_columns", "low", "high", "sizes", "room", "found")
#: vectors that are looked at together: a word has a bit for each of their values
_GROUP: Final = 64 // LANES


@functools.cache  # the code is the same each time
def compile_gather(dtype: torch.dtype, *, has_left: bool, processor: str = "") -> Kernel:
    """``gather(*ARGUMENTS)``: of the operand of a term, as TERM_FIELDS has it, and two floats' bits.

    Counts the values that are below low in size, or no numbers, into ``found[0]``, and those from low to high into
    ``found[1]``; the sizes of these go to ``sizes``, float32, but for those after the first ``room``. ``processor``: as
    in ``compile_function``.
    """
    module = _Gather(dtype, has_left=has_left, vectors=tile_vectors(processor)).module
    return compile_function(module, "gather", processor)


class _Gather(Tiles):
    """Groups of vectors that hold none are looked at once; of others each that is held is moved by itself."""

    def __init__(self, dtype: torch.dtype, *, has_left: bool, vectors: int) -> None:
        super().__init__(dtype, has_left=has_left, vectors=vectors)
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [I64] * len(ARGUMENTS)), "gather")
        b = ir.IRBuilder(function.append_basic_block())
        args = dict(zip(ARGUMENTS, function.args, strict=True))
        term = read_fields(b, b.inttoptr(args["term"], PTR), TERM_FIELDS)
        scale, low, high = (self.float_of(b, bits) for bits in (term["scale"], args["low"], args["high"]))
        room = b.alloca(I8, size=I64(ROWS * vectors * VECTOR_BYTES))
        values = b.inttoptr(b.ptrtoint(room, I64), PTR)  # of no type
        found, sizes = (b.inttoptr(args[name], PTR) for name in ("found", "sizes"))
        counts = [self.at(b, found, I64(8 * place)) for place in range(2)]
        for count in counts:
            b.store(I64(0), count, align=8)

        def one(tile: Tile) -> None:
            last = b.sub(args["num_rows"], I64(1))
            rows = [self.least(b, b.add(tile.row, I64(i)), last) for i in range(ROWS)]
            for place, vector in enumerate(self.operand(b, term, tile, rows, tile.column)):
                size = self.size(b, b.fmul(vector, scale))
                b.store(size, self.at(b, values, I64(place * VECTOR_BYTES)), align=1)

            def look(group: Value, seen: list[Value]) -> list[Value]:
                below, held = seen
                first = b.mul(group, I64(_GROUP))
                there = self.at(b, values, b.mul(first, I64(VECTOR_BYTES)))
                under = between = I64(0)
                for i in range(_GROUP):
                    size = b.load(self.at(b, there, I64(i * VECTOR_BYTES)), typ=self.floats, align=1)
                    above = b.fcmp_ordered(">=", size, low)
                    inside = self._inside(b, args["num_rows"], tile, b.add(first, I64(i)))
                    ours = b.and_(b.bitcast(b.and_(above, b.fcmp_ordered("<=", size, high)), I16), inside)
                    between = b.or_(between, b.shl(b.zext(ours, I64), I64(i * LANES)))
                    theirs = b.and_(b.not_(b.bitcast(above, I16)), inside)
                    under = b.or_(under, b.shl(b.zext(theirs, I64), I64(i * LANES)))
                number = self._ones(b, between)
                left = self.most(b, b.sub(args["room"], held), I64(0))
                self._move(b, there, between, self.at(b, sizes, b.mul(held, I64(4))), self.least(b, number, left))
                return [b.add(below, self._ones(b, under)), b.add(held, number)]

            before = [b.load(count, typ=I64, align=8) for count in counts]
            after = loop(b, I64(ROWS * tile.vectors // _GROUP), before, look)
            for count, number in zip(counts, after, strict=True):
                b.store(number, count, align=8)

        self.over(b, args["num_rows"], args["num_columns"], one)
        b.ret_void()

    def _inside(self, b: Value, num_rows: Value, tile: Tile, place: Value) -> Value:
        """16 bits: which of a tile's vector are the matrix's."""
        row = b.add(tile.row, b.udiv(place, I64(tile.vectors)))
        columns = I16(0xFFFF) if tile.mask is None else b.bitcast(tile.mask, I16)
        return b.select(b.icmp_unsigned("<", row, num_rows), columns, I16(0))

    def _ones(self, b: Value, bits: Value) -> Value:
        return b.call(self.declare("llvm.ctpop.i64", I64, I64), [bits])

    def _move(self, b: Value, values: Value, chosen: Value, there: Value, number: Value) -> None:
        """The first ``number`` of those ``chosen`` of ``values``."""
        first = self.declare("llvm.cttz.i64", I64, I64, I1)

        def one(index: Value, left: list[Value]) -> list[Value]:
            lane = b.call(first, [left[0], I1(1)])
            value = b.load(self.at(b, values, b.mul(lane, I64(4))), typ=F32, align=4)
            b.store(value, self.at(b, there, b.mul(index, I64(4))), align=4)
            return [b.and_(left[0], b.sub(left[0], I64(1)))]

        loop(b, number, [chosen], one)
