"""Functions of vectors of 16 floats for our CPU kernels, and numbers of three types read and written as such vectors.

Everything is made of integer and float32 instructions that every processor has: kernels of these need no instruction
of their own for bfloat16. NaN goes in and comes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch
from llvmlite import ir

from loraplex_kernels.cpu_ir import F32, I1, I32, I64, PTR, Pieces, Value, loop
from loraplex_kernels.lanes import LANES

VectorBody = Callable[[Value, Value | None, list[Value]], list[Value]]  # (first, mask, values) -> the next values

I16 = ir.IntType(16)
HALF = ir.HalfType()

#: the types that can be read and written
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)

#: between these, powers of two are normal numbers of float32
_EXP_LOW, _EXP_HIGH = -87.3365, 88.0
#: added and subtracted, it leaves a number rounded to an integer, and that integer in the lowest bits of the sum
_ROUNDER: Final = 1.5 * 2.0**23
#: ln 2 in two pieces: products of the first one with small integers are exact
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
#: of exp(r) - 1 - r, divided by r^2, where |r| <= ln(2) / 2; highest power first (Cephes, expf)
_EXP_TERMS: Final = (
    *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
)
#: odd powers of atanh(s) = s + s^3 / 3 + ..., for s up to 1/3
_ATANH_TERMS: Final = 9


class Numbers(Pieces):
    """Vectors of one stored type, which are float32 in registers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(bfloat16=False)
        self.dtype = dtype
        self.floats = ir.VectorType(F32, LANES)
        self.ints = ir.VectorType(I32, LANES)

    def constant(self, value: float) -> Value:
        return ir.Constant(self.floats, [value] * LANES)

    def fma(self, b: Value, left: Value, right: Value, added: Value) -> Value:
        """``left * right + added``, rounded once."""
        fma = self.declare("llvm.fma.v16f32", self.floats, self.floats, self.floats, self.floats)
        return b.call(fma, [left, right, added])

    def polynomial(self, b: Value, x: Value, terms: Sequence[float]) -> Value:
        """Highest power first."""
        total = self.constant(terms[0])
        for term in terms[1:]:
            total = self.fma(b, total, x, self.constant(term))
        return total

    def exp(self, b: Value, x: Value) -> Value:
        """Within 2 units of the last place; below the least normal number and above e^88 it stays there."""
        low, high = self.constant(_EXP_LOW), self.constant(_EXP_HIGH)
        x = b.select(b.fcmp_ordered("<", x, low), low, x)
        x = b.select(b.fcmp_ordered(">", x, high), high, x)
        rounder = self.constant(_ROUNDER)
        shifted = self.fma(b, x, self.constant(1 / math.log(2)), rounder)
        whole = b.fsub(shifted, rounder)
        rest = self.fma(b, whole, self.constant(-_LN2_HIGH), x)
        rest = self.fma(b, whole, self.constant(-_LN2_LOW), rest)
        square = b.fmul(rest, rest)
        power = b.fadd(self.fma(b, self.polynomial(b, rest, _EXP_TERMS), square, rest), self.constant(1.0))
        bits = b.shl(b.bitcast(shifted, self.ints), ir.Constant(self.ints, [23] * LANES))
        scale = b.add(bits, ir.Constant(self.ints, [127 << 23] * LANES))
        return b.fmul(power, b.bitcast(scale, self.floats))

    def decay(self, b: Value, x: Value) -> Value:
        """exp, which ends in zero."""
        nothing = b.fcmp_ordered("<", x, self.constant(_EXP_LOW))
        return b.select(nothing, self.constant(0.0), self.exp(b, x))

    def softplus(self, b: Value, x: Value) -> Value:
        """``max(x, 0) + log(1 + u)`` with u = exp(-abs(x)), where log(1 + u) = 2 atanh(u / (2 + u))."""
        zero = self.constant(0.0)
        positive = b.fcmp_ordered(">", x, zero)
        u = self.exp(b, b.select(positive, b.fsub(zero, x), x))
        s = b.fdiv(u, b.fadd(u, self.constant(2.0)))
        terms = [2.0 / (2 * power + 1) for power in range(_ATANH_TERMS)]
        log = b.fmul(s, self.polynomial(b, b.fmul(s, s), terms[::-1]))
        return b.fadd(b.select(positive, x, zero), log)

    def silu(self, b: Value, x: Value) -> Value:
        """``x / (1 + exp(-x))``"""
        one = self.constant(1.0)
        return b.fdiv(x, b.fadd(one, self.exp(b, b.fsub(self.constant(0.0), x))))

    def read(self, b: Value, pointer: Value, mask: Value | None, dtype: torch.dtype) -> Value:
        """16 numbers of ``dtype`` as floats; zeros where the mask is off. No mask: all are read."""
        kind = ir.VectorType(_element(dtype), LANES)
        if mask is None:
            return self._floats(b, b.load(pointer, typ=kind, align=1), dtype)
        load = self.declare(f"llvm.masked.load.{_suffix(kind)}.p0", kind, PTR, I32, ir.VectorType(I1, LANES), kind)
        return self._floats(b, b.call(load, [pointer, I32(1), mask, ir.Constant(kind, None)]), dtype)

    def write(self, b: Value, floats: Value, pointer: Value, mask: Value | None, dtype: torch.dtype) -> None:
        """Floats in ``dtype``, rounded to the nearest; where the mask is off memory stays as it is."""
        value = self._rounded(b, floats, dtype)
        kind = value.type
        if mask is None:
            b.store(value, pointer, align=1)
            return
        masks = ir.VectorType(I1, LANES)
        store = self.declare(f"llvm.masked.store.{_suffix(kind)}.p0", ir.VoidType(), kind, PTR, I32, masks)
        b.call(store, [value, pointer, I32(1), mask])

    def along(self, b: Value, count: Value, init: Sequence[Value], body: VectorBody) -> list[Value]:
        """``body`` for all whole vectors of ``count`` numbers, then for what is left, where there is any, under a mask.
        Returns the last values."""

        def whole(index: Value, values: list[Value]) -> list[Value]:
            return body(b.mul(index, I64(LANES)), None, values)

        num_whole = b.udiv(count, I64(LANES))
        values = loop(b, num_whole, init, whole)
        done = b.mul(num_whole, I64(LANES))
        before, tail, both = b.block, b.append_basic_block("tail"), b.append_basic_block("both")
        b.cbranch(b.icmp_unsigned("<", done, count), tail, both)
        b.position_at_end(tail)
        new = body(done, self.tail_mask(b, b.sub(count, done)), values)
        after = b.block
        b.branch(both)
        b.position_at_end(both)
        found = []
        for value, update in zip(values, new, strict=True):
            found.append(b.phi(value.type))
            found[-1].add_incoming(value, before)
            found[-1].add_incoming(update, after)
        return found

    def read_one(self, b: Value, pointer: Value) -> Value:
        """One number as a float."""
        return self._floats(b, b.load(pointer, typ=_element(self.dtype), align=1), self.dtype)

    def write_one(self, b: Value, value: Value, pointer: Value) -> None:
        b.store(self._rounded(b, value, self.dtype), pointer, align=1)

    def _floats(self, b: Value, stored: Value, dtype: torch.dtype) -> Value:
        if dtype is torch.float32:
            return stored
        floats = _like(stored, F32)
        if dtype is torch.float16:
            return b.fpext(stored, floats)
        ints = _like(stored, I32)
        return b.bitcast(b.shl(b.zext(stored, ints), _filled(ints, 16)), floats)

    def _rounded(self, b: Value, floats: Value, dtype: torch.dtype) -> Value:
        if dtype is torch.float32:
            return floats
        if dtype is torch.float16:
            return b.fptrunc(floats, _like(floats, HALF))
        ints = _like(floats, I32)
        bits = b.bitcast(floats, ints)
        odd = b.and_(b.lshr(bits, _filled(ints, 16)), _filled(ints, 1))
        nearest = b.add(bits, b.add(odd, _filled(ints, 0x7FFF)))
        quiet = b.or_(bits, _filled(ints, 0x400000))  # a NaN stays one, whichever bits are cut off
        kept = b.select(b.fcmp_unordered("uno", floats, floats), quiet, nearest)
        return b.trunc(b.lshr(kept, _filled(ints, 16)), _like(floats, I16))

    def tail_mask(self, b: Value, count: Value) -> Value:
        """The first ``count`` lanes."""
        return self.mask(b, I64(0), count, LANES)


def _element(dtype: torch.dtype) -> Value:
    return {torch.float32: F32, torch.bfloat16: I16, torch.float16: HALF}[dtype]


def _suffix(kind: Value) -> str:
    return f"v{kind.count}{ {F32: 'f32', I16: 'i16', HALF: 'f16'}[kind.element] }"


def _like(value: Value, element: Value) -> Value:
    """The value's type with other elements."""
    return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element


def _filled(kind: Value, value: int) -> Value:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)
