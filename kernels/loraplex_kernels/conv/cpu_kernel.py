"""The causal convolution, written for this processor's vectors and compiled by llvmlite when it is first needed: one
pass over the rows of a step, the activation in it, then what slots keep. Channels are shared among the threads."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import torch
from llvmlite import ir

from loraplex_kernels.cpu_ir import I1, I64, PTR, Kernel, Value, compile_function, loop
from loraplex_kernels.cpu_math import Numbers
from loraplex_kernels.cpu_team import begin_worker, emit_entry, emit_place, read_fields
from loraplex_kernels.lanes import LANES

#: int64 arguments of a call, in order
_ARGUMENTS: Final = (
    *("layout", "x", "weight", "bias", "states", "zeros", "out", "spans", "num_spans", "writes", "threads"),
)
#: int64 fields of a layout, in order; strides are in bytes, and 0 where sequences share a layer's weights
LAYOUT: Final = ("channels", "x_stride", "weight_stride", "bias_stride")
#: int64 fields of a span, in order; its inputs before the first row are those of ``source``, below 0: zeros
SPAN_FIELDS: Final = ("first_row", "num_rows", "source", "first_write", "num_writes")
#: and of a write: the inputs after so many of a span's rows go to a slot, a span's own last
WRITE_FIELDS: Final = ("after", "slot")
#: rows that weights are read once for
_TILE_ROWS: Final = 4


@dataclass(frozen=True, slots=True)
class ConvForm:
    """What is compiled."""

    dtype: torch.dtype
    width: int
    has_bias: bool


@functools.cache  # the code is the same each time
def compile_conv(form: ConvForm, processor: str = "") -> Kernel:
    """``convolve(layout, x, weight, bias, states, zeros, out, spans, num_spans, writes, threads)``.

    layout: the fields of LAYOUT; spans: int64 ``[num_spans, SPAN_FIELDS]``; writes: int64 ``[n, WRITE_FIELDS]``; zeros:
    ``[C]`` of x's dtype; bias: 0 where there is none; everything else as in the contract. The caller keeps every
    address alive and has checked every size. ``processor``: one to compile for (``compile_function``).
    """
    return compile_function(_Conv(form).module, "convolve", processor)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Where a span's inputs are: of its rows, and before them."""

    first: Value  # row 0 of the span
    past: Value  # what a slot keeps, or one row of zeros
    past_stride: Value
    x_stride: Value


class _Conv(Numbers):
    """The module's text: spans, tiles of their rows, and along a row the vectors of this thread's channels."""

    def __init__(self, form: ConvForm) -> None:
        super().__init__(form.dtype)
        self._form = form
        self._item = form.dtype.itemsize
        emit_entry(self, "convolve", _ARGUMENTS, self._worker())

    def _worker(self) -> Value:
        function, b = begin_worker(self)
        args = read_fields(b, function.args[0], _ARGUMENTS)
        args |= read_fields(b, b.inttoptr(args["layout"], PTR), LAYOUT)
        mine, team = emit_place(self, b)
        vectors = b.udiv(b.add(args["channels"], I64(LANES - 1)), I64(LANES))
        first, last = (b.mul(b.udiv(b.mul(vectors, edge), team), I64(LANES)) for edge in (mine, b.add(mine, I64(1))))
        count = b.sub(self.least(b, last, args["channels"]), first)
        row_bytes = b.mul(args["channels"], I64(self._item))
        skipped = b.mul(first, I64(self._item))
        for name in ("x", "weight", "bias", "states", "zeros", "out"):
            args[name] = b.add(args[name], skipped)
        args |= {"count": count, "row_bytes": row_bytes}
        args["slot_bytes"] = b.mul(row_bytes, I64(self._form.width - 1))

        def one_span(index: Value, _: list[Value]) -> list[Value]:
            place = b.add(args["spans"], b.mul(index, I64(8 * len(SPAN_FIELDS))))
            span = read_fields(b, b.inttoptr(place, PTR), SPAN_FIELDS)
            blank = b.icmp_signed("<", span["source"], I64(0))
            inputs = _Inputs(
                first=b.add(args["x"], b.mul(span["first_row"], args["x_stride"])),
                past=b.select(blank, args["zeros"], b.add(args["states"], b.mul(span["source"], args["slot_bytes"]))),
                past_stride=b.select(blank, I64(0), row_bytes),
                x_stride=args["x_stride"],
            )
            self._rows(b, args, (span, index), inputs)
            self._writes(b, args, span, inputs)
            return []

        some = b.icmp_signed(">", count, I64(0))
        with b.if_then(some):
            loop(b, args["num_spans"], (), one_span)
        b.ret_void()
        return function

    def _input(self, b: Value, inputs: _Inputs, row: Value) -> Value:
        """Where the inputs of a row of the span are, from row -(K-1) on."""
        kept = b.add(inputs.past, b.mul(b.add(row, I64(self._form.width - 1)), inputs.past_stride))
        given = b.add(inputs.first, b.mul(row, inputs.x_stride))
        return b.inttoptr(b.select(b.icmp_signed("<", row, I64(0)), kept, given), PTR)

    def _rows(self, b: Value, args: dict[str, Value], span: tuple[dict[str, Value], Value], inputs: _Inputs) -> None:
        fields, index = span
        out = b.add(args["out"], b.mul(fields["first_row"], args["row_bytes"]))
        weight = b.add(args["weight"], b.mul(index, args["weight_stride"]))
        bias = b.inttoptr(b.add(args["bias"], b.mul(index, args["bias_stride"])), PTR)
        taps = [b.inttoptr(b.add(weight, b.mul(args["row_bytes"], I64(tap))), PTR) for tap in range(self._form.width)]

        def tiles(first: Value, size: int, count: Value) -> None:
            def one_tile(tile: Value, _: list[Value]) -> list[Value]:
                row = b.add(first, b.mul(tile, I64(size)))
                seen = size + self._form.width - 1
                rows = [self._input(b, inputs, b.add(row, I64(i - self._form.width + 1))) for i in range(seen)]
                outs = [b.inttoptr(b.add(out, b.mul(b.add(row, I64(i)), args["row_bytes"])), PTR) for i in range(size)]
                self._tile(b, args["count"], (rows, taps, bias), outs)
                return []

            loop(b, count, (), one_tile)

        whole = b.udiv(fields["num_rows"], I64(_TILE_ROWS))
        done = b.mul(whole, I64(_TILE_ROWS))
        tiles(I64(0), _TILE_ROWS, whole)
        tiles(done, 1, b.sub(fields["num_rows"], done))

    def _tile(self, b: Value, count: Value, sources: tuple[list[Value], list[Value], Value], outs: list[Value]) -> None:
        """Some rows of out, from all rows of inputs that these see."""
        rows, taps, bias = sources

        def one_vector(begin: Value, mask: Value | None, _: list[Value]) -> list[Value]:
            offset = b.mul(begin, I64(self._item))
            seen, weights = (
                [self.read(b, self.at(b, row, offset), mask, self.dtype) for row in pointers]
                for pointers in (rows, taps)
            )
            added = self.constant(0.0)
            if self._form.has_bias:
                added = self.read(b, self.at(b, bias, offset), mask, self.dtype)
            for i, out in enumerate(outs):
                total = added
                for tap, weight in enumerate(weights):
                    total = self.fma(b, weight, seen[i + tap], total)
                self.write(b, self.silu(b, total), self.at(b, out, offset), mask, self.dtype)
            return []

        self.along(b, count, (), one_vector)

    def _writes(self, b: Value, args: dict[str, Value], span: dict[str, Value], inputs: _Inputs) -> None:
        """What slots keep. The oldest input first: where a slot's own inputs move up in it, none is overwritten before
        it was read."""
        copy = self.declare("llvm.memcpy.p0.p0.i64", ir.VoidType(), PTR, PTR, I64, I1)
        num_bytes = b.mul(args["count"], I64(self._item))

        def one_write(index: Value, _: list[Value]) -> list[Value]:
            place = b.add(args["writes"], b.mul(b.add(span["first_write"], index), I64(8 * len(WRITE_FIELDS))))
            write = read_fields(b, b.inttoptr(place, PTR), WRITE_FIELDS)
            slot = b.add(args["states"], b.mul(write["slot"], args["slot_bytes"]))
            for kept in range(self._form.width - 1):
                source = self._input(b, inputs, b.add(write["after"], I64(kept - self._form.width + 1)))
                there = b.inttoptr(b.add(slot, b.mul(args["row_bytes"], I64(kept))), PTR)
                b.call(copy, [there, source, num_bytes, I1(0)])
            return []

        loop(b, span["num_writes"], (), one_write)
