"""The product with a quantized matrix, written for this processor's vectors and compiled by llvmlite when it is first
needed: one call does all parts of a layer on all threads.

Up to 8 rows of x multiply by weights that are decoded in registers and never stored. For more, a block of W's rows is
decoded to memory of the nearest caches first, once for all rows of x.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from llvmlite import ir

from loraplex_kernels.cpu_ir import (
    F32,
    I64,
    PTR,
    Kernel,
    Pieces,
    Value,
    compile_function,
    has_kernel,
    has_vectors,
    loop,
)
from loraplex_kernels.cpu_team import begin_worker, emit_entry, emit_place, read_fields
from loraplex_kernels.lanes import VECTOR_BYTES
from loraplex_kernels.quant.cpu import TILE_ROWS
from loraplex_kernels.quant.cpu_decode import FIELDS, Decoder, Form
from loraplex_kernels.quant.packing import RUN

#: int64 arguments of a call, in order
_ARGUMENTS: Final = (
    *("parts", "num_parts", "total", "runs", "x", "x_stride", "rows", "y", "y_stride", "bias", "threads"),
    *("scratch", "block"),
)


@functools.cache  # the code is the same each time
def compile_product(dtype: torch.dtype, form: Form, processor: str = "") -> Kernel:
    """``product(parts, num_parts, total, runs, x, x_stride, rows, y, y_stride, bias, threads, scratch, block)``.

    parts: int64 ``[num_parts, FIELDS]``, all of ``form``; total: rows of W in all parts; runs: of 64 columns in a row
    of codes; x: rows of ``runs * 64`` columns; y: ``[rows, total]``; bias of x's dtype, or 0. With more than TILE_ROWS
    rows, scratch holds ``block`` rows of W for each thread. Strides are in bytes. The caller keeps every address alive
    and has checked every size. ``processor``: one without AVX-512 to compile for (``compile_function``).
    """
    permutes = not processor and has_kernel(torch.float32)
    return compile_function(_Product(dtype, form, permutes=permutes).module, "product", processor)


def can_compile(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for products in this dtype on this processor."""
    return has_kernel(dtype) or (dtype is torch.float32 and has_vectors())


class _Product(Pieces):
    """``y = x W.T + bias``, run by a team of threads: each does its share of the rows of W, part by part. One tile
    function for each number of rows of x, and one for weights in scratch."""

    def __init__(self, dtype: torch.dtype, form: Form, *, permutes: bool) -> None:
        super().__init__(dtype is torch.bfloat16)
        self.decoder = Decoder(self, form, permutes=permutes)
        self._tiles: dict[tuple[int, bool], Value] = {}
        emit_entry(self, "product", _ARGUMENTS, self._worker())

    def _worker(self) -> Value:
        function, b = begin_worker(self)
        args = read_fields(b, function.args[0], _ARGUMENTS)
        mine, team = emit_place(self, b)
        scratch_bytes = b.mul(args["block"], b.mul(args["runs"], I64(RUN * self.item)))
        args["scratch"] = b.add(args["scratch"], b.mul(mine, scratch_bytes))
        # shares begin at multiples of 4 rows
        step = b.and_(b.add(b.udiv(b.add(args["total"], b.sub(team, I64(1))), team), I64(3)), I64(~3))
        first = b.mul(step, mine)
        last = self.least(b, b.add(first, step), args["total"])

        def do_part(index: Value, _: list[Value]) -> list[Value]:
            place = b.add(args["parts"], b.mul(index, I64(8 * len(FIELDS))))
            part = read_fields(b, b.inttoptr(place, PTR), FIELDS)
            low = self.most(b, first, part["first"])
            high = self.least(b, last, b.add(part["first"], part["rows"]))
            with b.if_then(b.icmp_signed("<", low, high)):
                self._rows(b, args, part, b.sub(low, part["first"]), b.sub(high, part["first"]))
            return []

        loop(b, args["num_parts"], (), do_part)
        b.ret_void()
        return function

    def codes_of(self, b: Value, part: dict[str, Value], row: Value) -> Value:
        """Where a row's codes begin."""
        return b.inttoptr(b.add(part["codes"], b.mul(row, part["row_bytes"])), PTR)

    def decode_rows(
        self, b: Value, args: dict[str, Value], part: dict[str, Value], span: tuple[Value, Value, Value]
    ) -> None:
        """Emit the decoding of rows ``[first, last)`` of a part to the rows at ``out``, which lie end to end."""
        first, last, out = span
        row_bytes = b.mul(args["runs"], I64(RUN * self.item))

        def do_row(index: Value, _: list[Value]) -> list[Value]:
            row = b.add(first, index)
            codes = self.codes_of(b, part, row)
            there = b.inttoptr(b.add(out, b.mul(index, row_bytes)), PTR)
            whole = self.decoder.groups(b, part, row, I64(0)) if self.decoder.by_row else None

            def do_run(run: Value, _: list[Value]) -> list[Value]:
                groups = whole or self.decoder.groups(b, part, row, run)
                here = self.at(b, codes, b.mul(run, I64(self.decoder.run_bytes)))
                self.prefetch(b, here)
                place = self.at(b, there, b.mul(run, I64(RUN * self.item)))
                for i, vector in enumerate(self.decoder.vectors(b, here, groups)):
                    b.store(vector, self.at(b, place, I64(i * VECTOR_BYTES)), align=1)
                return []

            loop(b, args["runs"], (), do_run)
            return []

        loop(b, b.sub(last, first), (), do_row)

    def _rows(self, b: Value, args: dict[str, Value], part: dict[str, Value], first: Value, last: Value) -> None:
        """Rows ``[first, last)`` of a part."""
        few = b.icmp_unsigned("<=", args["rows"], I64(TILE_ROWS))
        with b.if_else(few) as (one, several):
            with one:
                self._call_tile(b, args, part, (first, last, args["rows"]))
            with several:
                self._by_blocks(b, args, part, first, last)

    def _by_blocks(self, b: Value, args: dict[str, Value], part: dict[str, Value], first: Value, last: Value) -> None:
        block = args["block"]
        blocks = b.udiv(b.add(b.sub(last, first), b.sub(block, I64(1))), block)
        chunks = b.udiv(b.add(args["rows"], I64(TILE_ROWS - 1)), I64(TILE_ROWS))

        def do_block(index: Value, _: list[Value]) -> list[Value]:
            begin = b.add(first, b.mul(index, block))
            end = self.least(b, b.add(begin, block), last)
            self.decode_rows(b, args, part, (begin, end, args["scratch"]))

            def do_chunk(chunk: Value, _: list[Value]) -> list[Value]:
                row = b.mul(chunk, I64(TILE_ROWS))
                moved = dict(args)
                moved["x"] = b.add(args["x"], b.mul(row, args["x_stride"]))
                moved["y"] = b.add(args["y"], b.mul(row, args["y_stride"]))
                count = self.least(b, b.sub(args["rows"], row), I64(TILE_ROWS))
                b.call(self._tile(TILE_ROWS, True), [*moved.values(), *part.values(), begin, end, count])
                return []

            loop(b, chunks, (), do_chunk)
            return []

        loop(b, blocks, (), do_block)

    def _call_tile(
        self, b: Value, args: dict[str, Value], part: dict[str, Value], span: tuple[Value, Value, Value]
    ) -> None:
        """The smallest tile that takes ``count`` rows of x."""
        given = [*args.values(), *part.values(), *span]
        done = b.append_basic_block("tiled")
        for size in (1, 2, 4, TILE_ROWS):
            here, beyond = b.append_basic_block(f"tile{size}"), b.append_basic_block("larger")
            b.cbranch(b.icmp_unsigned("<=", span[2], I64(size)), here, beyond)
            b.position_at_end(here)
            b.call(self._tile(size, False), given)
            b.branch(done)
            b.position_at_end(beyond)
        b.unreachable()
        b.position_at_end(done)

    def _tile(self, size: int, decoded: bool) -> Value:
        """Rows ``[begin, end)`` of a part by up to ``size`` rows of x, with weights from scratch where they are
        ``decoded``. Rows of x past ``count`` repeat the last one and write what it writes, and so do rows of W past
        ``end``."""
        key = (size, decoded)
        if key in self._tiles:
            return self._tiles[key]
        num_arguments = len(_ARGUMENTS) + len(FIELDS) + 3
        kind = ir.FunctionType(ir.VoidType(), [I64] * num_arguments)
        function = ir.Function(self.module, kind, f"rows{size}{'_decoded' if decoded else ''}")
        function.linkage = "internal"
        self._tiles[key] = function
        args = dict(zip(_ARGUMENTS, function.args, strict=False))
        part = dict(zip(FIELDS, function.args[len(_ARGUMENTS) :], strict=False))
        begin, end, count = function.args[-3:]
        b = ir.IRBuilder(function.append_basic_block())
        last_x, last_w = b.sub(count, I64(1)), b.sub(end, I64(1))
        places = [self.least(b, I64(i), last_x) for i in range(size)]
        xs = [b.inttoptr(b.add(args["x"], b.mul(place, args["x_stride"])), PTR) for place in places]
        ys = [b.add(args["y"], b.mul(place, args["y_stride"])) for place in places]
        wide = 4 if size <= 2 else 2

        def do_rows(index: Value, _: list[Value]) -> list[Value]:
            first = b.add(begin, b.mul(index, I64(wide)))
            rows = [self.least(b, b.add(first, I64(w)), last_w) for w in range(wide)]
            if decoded:
                sums = self._dot_decoded(b, args, [b.sub(row, begin) for row in rows], xs)
            else:
                sums = self._dot(b, part, rows, xs, args["runs"])
            for w, row in enumerate(rows):
                scale = self.decoder.row_scale(b, part, row) if self.decoder.scales_sums else None
                totals = [self.total(b, lanes) for lanes in sums[w * size : (w + 1) * size]]
                totals = totals if scale is None else [b.fmul(total, scale) for total in totals]
                self._store(b, args["bias"], b.add(part["first"], row), totals, ys)
            return []

        loop(b, b.udiv(b.add(b.sub(end, begin), I64(wide - 1)), I64(wide)), (), do_rows)
        b.ret_void()
        return function

    def _dot(self, b: Value, part: dict[str, Value], rows: list[Value], xs: list[Value], runs: Value) -> list[Value]:
        """Lanes whose sum is ``x[r] . W[w]``, w by w."""
        decoder = self.decoder
        codes = [self.codes_of(b, part, row) for row in rows]
        whole = [decoder.groups(b, part, row, I64(0)) if decoder.by_row else None for row in rows]

        def do_run(run: Value, sums: list[Value]) -> list[Value]:
            offset = b.mul(run, I64(decoder.run_bytes))
            for row in codes:  # rows are short, and several are read at once: no prefetcher sees where they lead
                self.prefetch(b, self.at(b, row, offset))
            weights = [
                decoder.vectors(b, self.at(b, codes[w], offset), whole[w] or decoder.groups(b, part, row, run))
                for w, row in enumerate(rows)
            ]
            return self._add_run(b, sums, weights, xs, run)

        return loop(b, runs, self._zeros(rows, xs), do_run)

    def _dot_decoded(self, b: Value, args: dict[str, Value], rows: list[Value], xs: list[Value]) -> list[Value]:
        """As ``_dot``, with weights from scratch, where ``rows`` are counted."""
        row_bytes = b.mul(args["runs"], I64(RUN * self.item))
        places = [b.inttoptr(b.add(args["scratch"], b.mul(row, row_bytes)), PTR) for row in rows]

        def do_run(run: Value, sums: list[Value]) -> list[Value]:
            begin = b.mul(run, I64(RUN * self.item))
            weights = [
                [self.load(b, place, b.add(begin, I64(i * VECTOR_BYTES)), self.stored) for i in range(self._vectors)]
                for place in places
            ]
            return self._add_run(b, sums, weights, xs, run)

        return loop(b, args["runs"], self._zeros(rows, xs), do_run)

    @property
    def _vectors(self) -> int:
        """Of a run."""
        return RUN * self.item // VECTOR_BYTES

    def _zeros(self, rows: list[Value], xs: list[Value]) -> list[Value]:
        return [ir.Constant(self.sum, None)] * (len(rows) * len(xs))

    def _add_run(
        self, b: Value, sums: list[Value], weights: list[list[Value]], xs: list[Value], run: Value
    ) -> list[Value]:
        begin, found = b.mul(run, I64(RUN * self.item)), list(sums)
        for i in range(self._vectors):
            for r, x in enumerate(xs):
                inputs = self.load(b, x, b.add(begin, I64(i * VECTOR_BYTES)), self.stored)
                for w, vectors in enumerate(weights):
                    place = w * len(xs) + r
                    found[place] = self.mac(b, found[place], inputs, vectors[i])
        return found

    def _store(self, b: Value, bias: Value, column: Value, totals: list[Value], ys: list[Value]) -> None:
        """A column of y."""
        added = self._bias(b, bias, column)
        for total, y in zip(totals, ys, strict=True):
            value = b.fadd(total, added)
            place = b.inttoptr(b.add(y, b.mul(column, I64(self.item))), PTR)
            b.store(b.fptrunc(value, self.element) if self.bf else value, place, align=1)

    def _bias(self, b: Value, bias: Value, column: Value) -> Value:
        here, none, both = (b.append_basic_block(name) for name in ("bias", "none", "both"))
        b.cbranch(b.icmp_unsigned("!=", bias, I64(0)), here, none)
        b.position_at_end(here)
        place = b.inttoptr(b.add(bias, b.mul(column, I64(self.item))), PTR)
        value = b.load(place, typ=self.element, align=1)
        value = b.fpext(value, F32) if self.bf else value
        b.branch(both)
        b.position_at_end(none)
        b.branch(both)
        b.position_at_end(both)
        found = b.phi(F32)
        found.add_incoming(value, here)
        found.add_incoming(ir.Constant(F32, 0.0), none)
        return found
