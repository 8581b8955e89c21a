"""The gate of a scan and its norm, compiled by llvmlite when first needed: each group of a row in two passes over
memory of the nearest cache, groups of all rows shared among the threads."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import torch
from llvmlite import ir

from loraplex_kernels.cpu_ir import F32, I32, I64, PTR, Kernel, Value, compile_function, loop
from loraplex_kernels.cpu_math import Numbers
from loraplex_kernels.cpu_team import begin_worker, emit_entry, emit_place, read_fields
from loraplex_kernels.lanes import LANES

#: int64 arguments of a call, in order
_ARGUMENTS: Final = ("layout", "y", "z", "weight", "out", "scratch", "threads")
#: int64 fields of a layout, in order; strides are in bytes, eps is the bits of a float
LAYOUT: Final = ("rows", "groups", "width", "y_stride", "z_stride", "weight_stride", "eps")


@dataclass(frozen=True, slots=True)
class GateForm:
    """What is compiled: numbers of a type, weights of a type or none."""

    dtype: torch.dtype
    weight: torch.dtype | None
    norm_before_gate: bool


@functools.cache  # the code is the same each time
def compile_gate(form: GateForm, processor: str = "") -> Kernel:
    """``gate(layout, y, z, weight, out, scratch, threads)``.

    layout: the fields of LAYOUT, width being a group's; weight: 0 where there is none; out: contiguous; scratch:
    float32 ``[threads, width]``. The caller keeps every address alive and has checked every size. ``processor``: one to
    compile for (``compile_function``).
    """
    return compile_function(_Gate(form).module, "gate", processor)


class _Gate(Numbers):
    """The module's text: groups of rows, and along one its vectors."""

    def __init__(self, form: GateForm) -> None:
        super().__init__(form.dtype)
        self._form = form
        emit_entry(self, "gate", _ARGUMENTS, self._worker())

    def _worker(self) -> Value:
        function, b = begin_worker(self)
        args = read_fields(b, function.args[0], _ARGUMENTS)
        args |= read_fields(b, b.inttoptr(args["layout"], PTR), LAYOUT)
        mine, team = emit_place(self, b)
        units = b.mul(args["rows"], args["groups"])
        first, last = (b.udiv(b.mul(units, edge), team) for edge in (mine, b.add(mine, I64(1))))
        scratch = b.inttoptr(b.add(args["scratch"], b.mul(mine, b.mul(args["width"], I64(4)))), PTR)

        def one_unit(index: Value, _: list[Value]) -> list[Value]:
            unit = b.add(first, index)
            row = b.udiv(unit, args["groups"])
            column = b.mul(b.urem(unit, args["groups"]), args["width"])

            def place(name: str, stride: Value, item: int) -> Value:
                return b.inttoptr(b.add(b.add(args[name], b.mul(row, stride)), b.mul(column, I64(item))), PTR)

            item = self.dtype.itemsize
            y, z = (place(name, args[f"{name}_stride"], item) for name in "yz")
            out = place("out", b.mul(b.mul(args["groups"], args["width"]), I64(item)), item)
            if self._form.weight is None:
                self._plain(b, args["width"], (y, z, out))
            else:
                weight = place("weight", args["weight_stride"], self._form.weight.itemsize)
                self._normed(b, args, (y, z, out), (weight, scratch))
            return []

        loop(b, b.sub(last, first), (), one_unit)
        b.ret_void()
        return function

    def _plain(self, b: Value, width: Value, rows: tuple[Value, Value, Value]) -> None:
        y, z, out = rows

        def one_vector(begin: Value, mask: Value | None, _: list[Value]) -> list[Value]:
            value = b.fmul(self._at(b, y, begin, mask), self.silu(b, self._at(b, z, begin, mask)))
            self.write(b, value, self._place(b, out, begin), mask, self.dtype)
            return []

        self.along(b, width, (), one_vector)

    def _normed(
        self, b: Value, args: dict[str, Value], rows: tuple[Value, Value, Value], others: tuple[Value, Value]
    ) -> None:
        y, z, out = rows
        weight, scratch = others
        weight_type = self._form.weight
        assert weight_type is not None
        first = self._form.norm_before_gate

        def add_square(begin: Value, mask: Value | None, sums: list[Value]) -> list[Value]:
            value = self._at(b, y, begin, mask)
            if not first:
                value = b.fmul(value, self.silu(b, self._at(b, z, begin, mask)))
                self.write(b, value, self.at(b, scratch, b.mul(begin, I64(4))), mask, torch.float32)
            return [self.fma(b, value, value, sums[0])]

        (squares,) = self.along(b, args["width"], (self.constant(0.0),), add_square)
        mean = b.fdiv(self.total(b, squares), b.uitofp(args["width"], F32))
        root = self.declare("llvm.sqrt.f32", F32, F32)
        eps = b.bitcast(b.trunc(args["eps"], I32), F32)
        scale = self.splat(b, b.fdiv(ir.Constant(F32, 1.0), b.call(root, [b.fadd(mean, eps)])), LANES)

        def scaled(begin: Value, mask: Value | None, _: list[Value]) -> list[Value]:
            if first:
                value = self._at(b, y, begin, mask)
            else:
                value = self.read(b, self.at(b, scratch, b.mul(begin, I64(4))), mask, torch.float32)
            place = self.at(b, weight, b.mul(begin, I64(weight_type.itemsize)))
            value = b.fmul(b.fmul(value, scale), self.read(b, place, mask, weight_type))
            if first:
                value = b.fmul(value, self.silu(b, self._at(b, z, begin, mask)))
            self.write(b, value, self._place(b, out, begin), mask, self.dtype)
            return []

        self.along(b, args["width"], (), scaled)

    def _place(self, b: Value, row: Value, begin: Value) -> Value:
        return self.at(b, row, b.mul(begin, I64(self.dtype.itemsize)))

    def _at(self, b: Value, row: Value, begin: Value, mask: Value | None) -> Value:
        return self.read(b, self._place(b, row, begin), mask, self.dtype)
