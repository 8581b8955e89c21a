"""The state-space scan, written for this processor's vectors and compiled by llvmlite when it is first needed.

The recurrence itself, row by row: some rows of a head's state stay in registers while the rows of a piece pass, so a
state is read once and written once for as many rows as a piece has, and a decode is a piece of one row. A chunked form
does as many multiplications for 64 rows at a time, and needs an exponential for each pair of rows. So how a prompt
is cut into chunks and what else is in the step never changes a bit of a result.

Every thread does the same share of every piece: some heads, or some rows of a head's state.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import torch
from llvmlite import ir

from loraplex_kernels.cpu_ir import F32, I64, PTR, Kernel, Value, compile_function, loop
from loraplex_kernels.cpu_math import Numbers
from loraplex_kernels.cpu_team import begin_worker, emit_entry, emit_place, read_fields
from loraplex_kernels.lanes import LANES
from loraplex_kernels.ssd.cpu_pieces import FIELDS, PIECE_ROWS

#: int64 arguments of a call, in order
_ARGUMENTS: Final = (
    *("layout", "x", "dt", "b", "c", "a", "d", "dt_bias", "states", "y", "pieces", "num_pieces", "threads"),
)
#: int64 fields of a layout, in order; strides are in bytes, limits are the bits of two floats
LAYOUT: Final = (
    *("heads", "groups", "head_dim", "x_stride", "dt_stride", "b_stride", "c_stride", "parameter_stride"),
    *("least", "largest"),
)
#: vectors of state that a unit keeps in registers, half of AVX-512's
_UNIT_VECTORS: Final = 16
#: and at most as many rows
_UNIT_ROWS: Final = 4
#: sums that are added to in turn, so that one need not wait for the last
_CHAINS: Final = 4


@functools.cache  # the code is the same each time
def compile_scan(dtype: torch.dtype, state_size: int, processor: str = "") -> Kernel:
    """``scan(layout, x, dt, b, c, a, d, dt_bias, states, y, pieces, num_pieces, threads)``.

    layout: the fields of LAYOUT; pieces: int64 ``[num_pieces, FIELDS]`` of at most PIECE_ROWS rows each; everything
    else as in the contract, y contiguous. The caller keeps every address alive and has checked every size.
    ``processor``: one to compile for (``compile_function``).
    """
    return compile_function(_Scan(dtype, state_size).module, "scan", processor)


@dataclass(frozen=True, slots=True)
class _Scratch:
    """Memory of a thread: B and C of a group and a piece's rows, ``[PIECE_ROWS, vectors of a state, 16]`` each, and
    16 heads' time steps and decays, ``[PIECE_ROWS, 16]`` each; all float32."""

    b: Value
    c: Value
    steps: Value
    decays: Value
    zeros: Value  # a row of a state


@dataclass(frozen=True, slots=True)
class _Share:
    """A thread's units, ``[first, last)``: a head's are its rows of state, some to each."""

    first: Value
    last: Value
    by_head: Value


class _Scan(Numbers):
    """The module's text: pieces, groups of heads, up to 16 heads of a group, their units, and of a unit the rows."""

    def __init__(self, dtype: torch.dtype, state_size: int) -> None:
        super().__init__(dtype)
        self._size = state_size
        self._vectors = -(-state_size // LANES)
        self._rows = max(1, min(_UNIT_ROWS, _UNIT_VECTORS // self._vectors))
        self._row_bytes = self._vectors * LANES * 4
        emit_entry(self, "scan", _ARGUMENTS, self._worker())

    def _worker(self) -> Value:
        function, b = begin_worker(self)
        scratch = self._scratch(b)
        args = read_fields(b, function.args[0], _ARGUMENTS)
        args |= read_fields(b, b.inttoptr(args["layout"], PTR), LAYOUT)
        mine, team = emit_place(self, b)
        by_head = b.udiv(b.add(args["head_dim"], I64(self._rows - 1)), I64(self._rows))
        units = b.mul(args["heads"], by_head)
        first, last = (b.udiv(b.mul(units, edge), team) for edge in (mine, b.add(mine, I64(1))))
        args["shared"] = b.udiv(args["heads"], args["groups"])
        some = b.icmp_unsigned("<", first, last)
        with b.if_then(some):
            self._pieces(b, args, scratch, _Share(first, last, by_head))
        b.ret_void()
        return function

    def _scratch(self, b: Value) -> _Scratch:
        def rows(size: int) -> Value:
            return b.inttoptr(b.ptrtoint(b.alloca(ir.ArrayType(F32, size)), I64), PTR)

        row = self._vectors * LANES
        made = _Scratch(
            b=rows(PIECE_ROWS * row),
            c=rows(PIECE_ROWS * row),
            steps=rows(PIECE_ROWS * LANES),
            decays=rows(PIECE_ROWS * LANES),
            zeros=rows(row),
        )
        for vector in range(self._vectors):
            b.store(self.constant(0.0), self.at(b, made.zeros, I64(vector * LANES * 4)), align=4)
        return made

    def _pieces(self, b: Value, args: dict[str, Value], scratch: _Scratch, share: _Share) -> None:
        first_head = b.udiv(share.first, share.by_head)
        last_head = b.add(b.udiv(b.sub(share.last, I64(1)), share.by_head), I64(1))
        first_group = b.udiv(first_head, args["shared"])
        num_groups = b.sub(b.add(b.udiv(b.sub(last_head, I64(1)), args["shared"]), I64(1)), first_group)

        def one_piece(p: Value, _: list[Value]) -> list[Value]:
            place = b.add(args["pieces"], b.mul(p, I64(8 * len(FIELDS))))
            piece = read_fields(b, b.inttoptr(place, PTR), FIELDS)

            def one_group(index: Value, _: list[Value]) -> list[Value]:
                group = b.add(first_group, index)
                self._spread(b, args, piece, group, scratch)
                begin = self.most(b, first_head, b.mul(group, args["shared"]))
                end = self.least(b, last_head, b.mul(b.add(group, I64(1)), args["shared"]))
                tiles = b.udiv(b.add(b.sub(end, begin), I64(LANES - 1)), I64(LANES))

                def one_tile(tile: Value, _: list[Value]) -> list[Value]:
                    head = b.add(begin, b.mul(tile, I64(LANES)))
                    count = self.least(b, b.sub(end, head), I64(LANES))
                    self._steps(b, args, piece, (head, count), scratch)
                    self._heads(b, args, piece, (head, count), (scratch, share))
                    return []

                loop(b, tiles, (), one_tile)
                return []

            loop(b, num_groups, (), one_group)
            return []

        loop(b, args["num_pieces"], (), one_piece)

    def _spread(
        self, b: Value, args: dict[str, Value], piece: dict[str, Value], group: Value, scratch: _Scratch
    ) -> None:
        """B and C of a group as floats, rows end to end, with zeros behind the last value of each."""
        begin = b.mul(group, I64(self._size * self._item))

        def one_row(row: Value, _: list[Value]) -> list[Value]:
            at = b.add(piece["first_row"], row)
            for name, target in (("b", scratch.b), ("c", scratch.c)):
                source = b.inttoptr(b.add(b.add(args[name], b.mul(at, args[f"{name}_stride"])), begin), PTR)
                for vector in range(self._vectors):
                    here = self.at(b, source, I64(vector * LANES * self._item))
                    there = self.at(b, target, b.add(b.mul(row, I64(self._row_bytes)), I64(vector * LANES * 4)))
                    b.store(self.read(b, here, self._mask(vector), self.dtype), there, align=4)
            return []

        loop(b, piece["num_rows"], (), one_row)

    @property
    def _item(self) -> int:
        """Bytes of a stored number."""
        return self.dtype.itemsize

    def _mask(self, vector: int) -> Value | None:
        """Of a row of state, B or C; None: all of the vector."""
        count = min(LANES, self._size - vector * LANES)
        masks = ir.VectorType(ir.IntType(1), LANES)
        return None if count == LANES else ir.Constant(masks, [int(lane < count) for lane in range(LANES)])

    def _steps(
        self, b: Value, args: dict[str, Value], piece: dict[str, Value], heads: tuple[Value, Value], scratch: _Scratch
    ) -> None:
        """Time steps and decays of a piece's rows, of up to 16 heads."""
        head, count = heads
        mask = self.tail_mask(b, count)
        of_span = b.add(b.mul(piece["span"], args["parameter_stride"]), b.mul(head, I64(4)))
        a, bias = (
            self.read(b, b.inttoptr(b.add(args[name], of_span), PTR), mask, torch.float32) for name in ("a", "dt_bias")
        )
        least, largest = (
            self.splat(b, b.bitcast(b.trunc(args[name], ir.IntType(32)), F32), LANES) for name in ("least", "largest")
        )

        def one_row(row: Value, _: list[Value]) -> list[Value]:
            at = b.mul(b.add(piece["first_row"], row), args["dt_stride"])
            place = b.inttoptr(b.add(b.add(args["dt"], at), b.mul(head, I64(self._item))), PTR)
            step = self.softplus(b, b.fadd(self.read(b, place, mask, self.dtype), bias))
            held = b.select(b.fcmp_ordered("<", step, least), least, step)
            held = b.select(b.fcmp_ordered(">", held, largest), largest, held)
            step = b.select(b.icmp_unsigned("<", row, piece["num_limited"]), held, step)
            offset = b.mul(row, I64(LANES * 4))
            b.store(step, self.at(b, scratch.steps, offset), align=4)
            b.store(self.decay(b, b.fmul(step, a)), self.at(b, scratch.decays, offset), align=4)
            return []

        loop(b, piece["num_rows"], (), one_row)

    def _heads(
        self,
        b: Value,
        args: dict[str, Value],
        piece: dict[str, Value],
        heads: tuple[Value, Value],
        mine: tuple[_Scratch, _Share],
    ) -> None:
        """This thread's units of up to 16 heads."""
        scratch, share = mine

        def one_head(index: Value, _: list[Value]) -> list[Value]:
            head = b.add(heads[0], index)
            its_first = b.mul(head, share.by_head)
            begin = b.sub(self.most(b, share.first, its_first), its_first)
            end = self.least(b, b.sub(share.last, its_first), share.by_head)
            d_at = b.add(b.mul(piece["span"], args["parameter_stride"]), b.mul(head, I64(4)))
            d = b.load(b.inttoptr(b.add(args["d"], d_at), PTR), typ=F32, align=4)

            def one_unit(unit: Value, _: list[Value]) -> list[Value]:
                first = b.mul(b.add(begin, unit), I64(self._rows))
                # rows past a head's last one repeat it, and write what it writes
                last = b.sub(args["head_dim"], I64(1))
                places = [self.least(b, b.add(first, I64(r)), last) for r in range(self._rows)]
                rows = [b.add(b.mul(head, args["head_dim"]), place) for place in places]
                self._unit(b, args, piece, (rows, d, index), scratch)
                return []

            loop(b, b.sub(end, begin), (), one_unit)
            return []

        loop(b, heads[1], (), one_head)

    def _unit(
        self,
        b: Value,
        args: dict[str, Value],
        piece: dict[str, Value],
        unit: tuple[list[Value], Value, Value],
        scratch: _Scratch,
    ) -> None:
        """All rows of a piece by some rows of state: ``unit`` = (which of all heads' rows, d, place among 16 heads)."""
        rows, d, lane = unit
        state_bytes = b.mul(b.mul(args["heads"], args["head_dim"]), I64(self._size * 4))
        blank = b.icmp_signed("<", piece["source"], I64(0))

        def in_slot(slot: Value, row: Value) -> Value:
            offset = b.add(b.mul(slot, state_bytes), b.mul(row, I64(self._size * 4)))
            return b.inttoptr(b.add(args["states"], offset), PTR)

        states = []
        for row in rows:
            source = b.select(blank, scratch.zeros, in_slot(piece["source"], row))
            states += [
                self.read(b, self.at(b, source, I64(v * LANES * 4)), self._mask(v), torch.float32)
                for v in range(self._vectors)
            ]

        def one_row(i: Value, states: list[Value]) -> list[Value]:
            of_head = b.add(b.mul(i, I64(LANES * 4)), b.mul(lane, I64(4)))
            step, decay = (
                b.load(self.at(b, base, of_head), typ=F32, align=4) for base in (scratch.steps, scratch.decays)
            )
            at = b.add(piece["first_row"], i)
            x_row = b.add(args["x"], b.mul(at, args["x_stride"]))
            xs = [self.read_one(b, b.inttoptr(b.add(x_row, b.mul(row, I64(self._item))), PTR)) for row in rows]
            new, totals = self._update(b, states, (self.splat(b, decay, LANES), step, xs), i, scratch)
            y_row = b.mul(at, b.mul(args["heads"], args["head_dim"]))
            for row, x, total in zip(rows, xs, totals, strict=True):
                place = b.add(args["y"], b.mul(b.add(y_row, row), I64(self._item)))
                self.write_one(b, b.fadd(total, b.fmul(d, x)), b.inttoptr(place, PTR))
            return new

        states = loop(b, piece["num_rows"], states, one_row)
        self._keep(b, states, [in_slot(piece["slot"], row) for row in rows])
        with b.if_then(b.icmp_signed(">=", piece["also"], I64(0))):
            self._keep(b, states, [in_slot(piece["also"], row) for row in rows])

    def _update(
        self, b: Value, states: list[Value], scalars: tuple[Value, Value, list[Value]], i: Value, scratch: _Scratch
    ) -> tuple[list[Value], list[Value]]:
        """The rows of state after row i of the piece, and of each the product with C."""
        decay, step, xs = scalars
        stepped = [self.splat(b, b.fmul(step, x), LANES) for x in xs]
        chains = min(self._vectors, max(1, _CHAINS // self._rows))
        new = list(states)
        sums: list[list[Value]] = [[] for _ in xs]
        begin = b.mul(i, I64(self._row_bytes))
        for v in range(self._vectors):
            offset = b.add(begin, I64(v * LANES * 4))
            b_v, c_v = (self.load(b, base, offset, self.floats) for base in (scratch.b, scratch.c))
            for r, its_sums in enumerate(sums):
                place = r * self._vectors + v
                new[place] = self.fma(b, stepped[r], b_v, b.fmul(states[place], decay))
                if v < chains:
                    its_sums.append(b.fmul(new[place], c_v))
                else:
                    its_sums[v % chains] = self.fma(b, new[place], c_v, its_sums[v % chains])
        totals = []
        for its_sums in sums:
            total = its_sums[0]
            for other in its_sums[1:]:
                total = b.fadd(total, other)
            totals.append(self.total(b, total))
        return new, totals

    def _keep(self, b: Value, states: list[Value], places: list[Value]) -> None:
        for r, place in enumerate(places):
            for v in range(self._vectors):
                there, value = self.at(b, place, I64(v * LANES * 4)), states[r * self._vectors + v]
                self.write(b, value, there, self._mask(v), torch.float32)
