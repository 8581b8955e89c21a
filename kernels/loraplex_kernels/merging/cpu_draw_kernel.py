"""Drawing many random numbers, compiled by llvmlite when it is first needed.

They are MT19937's: 624 at a time come of the 624 before them, by operations on whole vectors, for what a number is made
of lies far enough away.

Source: Matsumoto, Nishimura, ACM TOMACS 8 (1998).
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from llvmlite import ir

from loraplex_kernels.cpu_ir import I64, PTR, Kernel, Value, compile_function, loop
from loraplex_kernels.cpu_math import I16, Numbers
from loraplex_kernels.lanes import LANES
from loraplex_kernels.merging.cpu import STATE

I8, I32 = ir.IntType(8), ir.IntType(32)

#: how far ahead one of the numbers is that a new one is made of
_AHEAD: Final = 397
_UPPER, _LOWER, _TWIST = 0x80000000, 0x7FFFFFFF, 0x9908B0DF


@functools.cache  # the code is the same each time
def compile_draw(processor: str = "") -> Kernel:
    """``draw(state, place, count, limit, bits)``: a bit for each of the next ``count`` numbers whose lowest 24 bits are
    below ``limit``, into ``bits``, which are zeros.

    state: uint32 ``[STATE]``; place: int64 ``[1]``, how many of it were taken. ``processor``: as in
    ``compile_function``.
    """
    return compile_function(_Draw().module, "draw", processor)


@functools.cache  # the code is the same each time
def compile_renew(processor: str = "") -> Kernel:
    """``renew(state, count)``: the ``count``-th next state. ``processor``: as in ``compile_function``."""
    return compile_function(_Renew().module, "renew", processor)


class _Twister(Numbers):
    """States of the generator, at ``state``."""

    def __init__(self, name: str, num_arguments: int) -> None:
        super().__init__(torch.float32)
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [I64] * num_arguments), name)
        self.builder = ir.IRBuilder(function.append_basic_block())
        state, *self.arguments = function.args
        self.state = self.builder.inttoptr(state, PTR)

    def renew(self, b: Value) -> None:
        """The next 624 numbers, in their order: those that a vector is made of are old ones, or long written."""
        change = STATE - _AHEAD  # the first one that is made of a new one
        self._span(b, 0, change, _AHEAD)
        self._span(b, change, STATE - 1 - change, _AHEAD - STATE)
        self._twist(b, I64(STATE - 1), I32, (I64(0), I64(_AHEAD - 1)))

    def _span(self, b: Value, first: int, count: int, ahead: int) -> None:
        def over(start: int, number: int, step: int, kind: Value) -> None:
            def one(index: Value, _: list[Value]) -> list[Value]:
                at = b.add(I64(start), b.mul(index, I64(step)))
                self._twist(b, at, kind, (b.add(at, I64(1)), b.add(at, I64(ahead))))
                return []

            loop(b, I64(number), (), one)

        whole = count // LANES
        over(first, whole, LANES, self.ints)
        over(first + whole * LANES, count % LANES, 1, I32)

    def _twist(self, b: Value, at: Value, kind: Value, made_of: tuple[Value, Value]) -> None:
        own, after, far = (self.number(b, index, kind) for index in (at, *made_of))
        mixed = b.or_(b.and_(own, _like(own, _UPPER)), b.and_(after, _like(own, _LOWER)))
        odd = b.sub(_like(own, 0), b.and_(mixed, _like(own, 1)))  # all bits, or none
        new = b.xor(far, b.xor(b.lshr(mixed, _like(own, 1)), b.and_(odd, _like(own, _TWIST))))
        b.store(new, self.place(b, at), align=4)

    def number(self, b: Value, index: Value, kind: Value) -> Value:
        return b.load(self.place(b, index), typ=kind, align=4)

    def place(self, b: Value, index: Value) -> Value:
        return self.at(b, self.state, b.mul(index, I64(4)))


class _Renew(_Twister):
    """One after another."""

    def __init__(self) -> None:
        super().__init__("renew", 2)
        b = self.builder

        def one(index: Value, _: list[Value]) -> list[Value]:
            del index
            self.renew(b)
            return []

        loop(b, self.arguments[0], (), one)
        b.ret_void()


class _Draw(_Twister):
    """While there is something left to draw: a new state where the last is used up, then a vector of it, or, beside its
    end and beside that of a byte, one number."""

    def __init__(self) -> None:
        super().__init__("draw", 5)
        b = self.builder
        place, count, limit, bits = self.arguments
        self._bits, self._limit = b.inttoptr(bits, PTR), b.trunc(limit, I32)
        self._all(b, b.inttoptr(place, PTR), count)
        b.ret_void()

    def _all(self, b: Value, place: Value, count: Value) -> None:
        before, head = b.block, b.append_basic_block("head")
        taken = b.load(place, typ=I64, align=8)
        b.branch(head)
        b.position_at_end(head)
        drawn, at = b.phi(I64), b.phi(I64)
        drawn.add_incoming(I64(0), before)
        at.add_incoming(taken, before)
        inside, done = b.append_basic_block("inside"), b.append_basic_block("done")
        b.cbranch(b.icmp_unsigned("<", drawn, count), inside, done)
        b.position_at_end(inside)
        used = b.icmp_unsigned("==", at, I64(STATE))
        with b.if_then(used):
            self.renew(b)
        here = b.select(used, I64(0), at)
        whole = b.and_(
            b.icmp_unsigned("<=", b.add(here, I64(LANES)), I64(STATE)),
            b.and_(
                b.icmp_unsigned("<=", b.add(drawn, I64(LANES)), count),
                b.icmp_unsigned("==", b.and_(drawn, I64(7)), I64(0)),
            ),
        )
        vector, single, next_one = (b.append_basic_block(name) for name in ("vector", "single", "next"))
        b.cbranch(whole, vector, single)
        b.position_at_end(vector)
        self._draw_vector(b, here, drawn)
        b.branch(next_one)
        b.position_at_end(single)
        self._draw_one(b, here, drawn)
        b.branch(next_one)
        b.position_at_end(next_one)
        step = b.select(whole, I64(LANES), I64(1))
        drawn.add_incoming(b.add(drawn, step), b.block)
        at.add_incoming(b.add(here, step), b.block)
        b.branch(head)
        b.position_at_end(done)
        b.store(at, place, align=8)

    def _draw_vector(self, b: Value, at: Value, drawn: Value) -> None:
        below = self._below(b, self.number(b, at, self.ints))
        b.store(b.bitcast(below, I16), self.at(b, self._bits, b.lshr(drawn, I64(3))), align=1)

    def _draw_one(self, b: Value, at: Value, drawn: Value) -> None:
        below = b.zext(self._below(b, self.number(b, at, I32)), I8)
        byte = self.at(b, self._bits, b.lshr(drawn, I64(3)))
        bit = b.shl(below, b.trunc(b.and_(drawn, I64(7)), I8))
        b.store(b.or_(b.load(byte, typ=I8, align=1), bit), byte, align=1)

    def _below(self, b: Value, number: Value) -> Value:
        """A number of the state, or some, as it is given out; of that the lowest 24 bits, against the limit."""

        def filled(value: int) -> Value:
            return _like(number, value)

        number = b.xor(number, b.lshr(number, filled(11)))
        number = b.xor(number, b.and_(b.shl(number, filled(7)), filled(0x9D2C5680)))
        number = b.xor(number, b.and_(b.shl(number, filled(15)), filled(0xEFC60000)))
        number = b.xor(number, b.lshr(number, filled(18)))
        limit = self._limit if number.type == I32 else self.splat(b, self._limit, LANES)
        return b.icmp_unsigned("<", b.and_(number, filled(0xFFFFFF)), limit)


def _like(number: Value, value: int) -> Value:
    return ir.Constant(number.type, [value] * LANES if isinstance(number.type, ir.VectorType) else value)
