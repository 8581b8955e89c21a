"""The low-rank product over small segments, written for this processor's vectors and compiled by llvmlite at start.

A library call costs more than the arithmetic of a decode: 13 us before a bfloat16 product begins, where eight rows of
rank 16 need three. Here one call does all segments of a layer, each with its own slot, and reads every factor once, in
the order it lies in memory. No compiler is needed on the machine; compiling takes about 0.1 s.

Layouts (``cpu_factors.py`` makes them): W elements are 64 bytes, 32 of bfloat16 or 16 of float32::

    A   [rows, in rounded up to W]                            rows of each part rounded up to even
    B   [size rounded up to 16, / 16][rank / 2][16][2]        bfloat16: two ranks side by side, as the dot product wants
        [size rounded up to 16, / 16][rank / 2][2][16]        float32

bfloat16 uses AVX512-BF16's dot product (sums in float32, A x rounded once); float32 uses fused multiply-adds.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from llvmlite import binding as llvm
from llvmlite import ir

from loraplex_kernels.lora.cpu_factors import BLOCK_ROWS, LANES, VECTOR_BYTES

#: bytes that are asked for ahead of use: factors come from main memory, a page at a time
PREFETCH_BYTES: Final = 8192
#: int64 fields of a tile and of a part, in the order the kernel reads them
TILE_FIELDS: Final = 6  # first row, last row + 1, address of A, rows of A, address of its first part, parts
PART_FIELDS: Final = 5  # first row of A, pairs of ranks, address of B, column of y, size

I1, I32, I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
F32 = ir.FloatType()
PTR = ir.PointerType()

Value = Any  # llvmlite has no types
Kernel = Callable[..., None]
Body = Callable[[Value, list[Value]], list[Value]]  # (index, values) -> the next values


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite's builder lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


def has_kernel(dtype: torch.dtype) -> bool:
    """Whether small segments of this type can be compiled for this processor."""
    features = llvm.get_host_cpu_features()
    wide = bool(features.get("avx512f"))
    return wide and (dtype is torch.float32 or (dtype is torch.bfloat16 and bool(features.get("avx512bf16"))))


@functools.cache  # the code is the same each time
def compile_kernel(dtype: torch.dtype) -> Kernel:
    """``add_segments(x, y, x_stride, y_stride, in, tiles, num_tiles, weights, scratch_x, scratch_h, h_stride)``.

    Addresses and strides are in bytes. tiles: int64 ``[n, TILE_FIELDS]``; parts: int64 ``[m, PART_FIELDS]``; weights:
    float32 ``[n]``; scratch_x holds ``BLOCK_ROWS`` padded rows of x, scratch_h as many rows of A x. The caller keeps
    every address alive and has checked every size.
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module = llvm.parse_assembly(str(_Source(dtype is torch.bfloat16).module))
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 11)(engine.get_function_address("add_segments"))
    call.engine = engine  # type: ignore[attr-defined]  # the code lives as long as the function
    return call


def _for(
    b: Value, count: Value, init: Iterable[Value], body: Callable[[Value, list[Value]], list[Value]]
) -> list[Value]:
    """``for i in range(count): values = body(i, values)``; returns the last values."""
    before, head = b.block, b.append_basic_block("head")
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(I64)
    index.add_incoming(I64(0), before)
    values = []
    for start in init:
        values.append(b.phi(start.type))
        values[-1].add_incoming(start, before)
    inside, done = b.append_basic_block("body"), b.append_basic_block("done")
    b.cbranch(b.icmp_unsigned("<", index, count), inside, done)
    b.position_at_end(inside)
    new = body(index, values)
    index.add_incoming(b.add(index, I64(1)), b.block)
    for value, update in zip(values, new, strict=True):
        value.add_incoming(update, b.block)
    b.branch(head)
    b.position_at_end(done)
    return values


class _Source:
    """The module's text: one ``tile`` function for each number of rows, and the loop over tiles."""

    def __init__(self, bfloat16: bool) -> None:
        self._bf = bfloat16
        self._item = 2 if bfloat16 else 4
        self._width = VECTOR_BYTES // self._item
        self._element = _BFloat() if bfloat16 else F32
        self._stored = ir.VectorType(self._element, self._width)  # 64 bytes of A, x or B
        self._sum = ir.VectorType(F32, LANES)
        self._columns = ir.VectorType(self._element, LANES)  # 16 columns of y
        self.module = ir.Module("lora")
        tiles = {rows: self._tile(rows) for rows in (1, 2, 4, BLOCK_ROWS)}
        self._loop_over_tiles(tiles)

    # ---- small pieces ----

    def _declare(self, name: str, result: Value, *arguments: Value) -> Value:
        known = self.module.globals.get(name)
        return known or ir.Function(self.module, ir.FunctionType(result, arguments), name)

    def _at(self, b: Value, base: Value, offset: Value) -> Value:
        """``base + offset`` bytes."""
        return b.gep(base, [offset], source_etype=ir.IntType(8))

    def _load(self, b: Value, base: Value, offset: Value, kind: Value) -> Value:
        return b.load(self._at(b, base, offset), typ=kind, align=1)

    def _prefetch(self, b: Value, pointer: Value) -> None:
        """Ask for what is read ``PREFETCH_BYTES`` later; past a slot's end this costs nothing and never faults."""
        ask = self._declare("llvm.prefetch.p0", ir.VoidType(), PTR, I32, I32, I32)
        b.call(ask, [self._at(b, pointer, I64(PREFETCH_BYTES)), I32(0), I32(3), I32(1)])

    def _splat(self, b: Value, scalar: Value, lanes: int) -> Value:
        kind = ir.VectorType(scalar.type, lanes)
        one = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return b.shuffle_vector(
            one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        )

    def _mask(self, b: Value, first: Value, limit: Value, lanes: int) -> Value:
        """Lane l is on when ``first + l < limit``."""
        lane = ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))
        place = b.add(self._splat(b, first, lanes), lane)
        return b.icmp_unsigned("<", place, self._splat(b, limit, lanes))

    def _name(self, kind: Value) -> str:
        return f"v{kind.count}{'bf16' if kind.element == _BFloat() else 'f32'}"

    def _load_masked(self, b: Value, pointer: Value, mask: Value, kind: Value) -> Value:
        masks = ir.VectorType(I1, kind.count)
        load = self._declare(f"llvm.masked.load.{self._name(kind)}.p0", kind, PTR, I32, masks, kind)
        return b.call(load, [pointer, I32(1), mask, ir.Constant(kind, None)])

    def _store_masked(self, b: Value, value: Value, pointer: Value, mask: Value) -> None:
        masks = ir.VectorType(I1, value.type.count)
        store = self._declare(
            f"llvm.masked.store.{self._name(value.type)}.p0", ir.VoidType(), value.type, PTR, I32, masks
        )
        b.call(store, [value, pointer, I32(1), mask])

    def _mac(self, b: Value, total: Value, left: Value, right: Value) -> Value:
        """``total + left * right``, pairs of bfloat16 summed into a lane."""
        if self._bf:
            name = "llvm.x86.avx512bf16.dpbf16ps.512"
            dot = self._declare(name, self._sum, self._sum, self._stored, self._stored)
            return b.call(dot, [total, left, right])
        fma = self._declare("llvm.fma.v16f32", self._sum, self._sum, self._sum, self._sum)
        return b.call(fma, [left, right, total])

    def _total(self, b: Value, lanes: Value) -> Value:
        add = self._declare("llvm.vector.reduce.fadd.v16f32", F32, F32, self._sum)
        return b.call(add, [ir.Constant(F32, 0.0), lanes], fastmath=("reassoc",))

    # ---- the functions ----

    def _tile(self, rows: int) -> Value:
        """Up to ``rows`` rows through one slot. Rows past ``count`` repeat the last one and write what it writes."""
        # x, y, x_stride, y_stride, count, in, tile, weight, scratch_x, scratch_h, h_stride
        kind = ir.FunctionType(ir.VoidType(), [I64, I64, I64, I64, I64, I64, PTR, F32, PTR, PTR, I64])
        function = ir.Function(self.module, kind, f"tile{rows}")
        function.linkage = "internal"
        x, y, x_stride, y_stride, count, width, tile, weight, scratch_x, scratch_h, h_stride = function.args
        b = ir.IRBuilder(function.append_basic_block())
        last = b.sub(count, I64(1))
        row_of = [I64(0)] + [b.select(b.icmp_unsigned("<", I64(i), count), I64(i), last) for i in range(1, rows)]
        x_rows = [b.inttoptr(b.add(x, b.mul(row, x_stride)), PTR) for row in row_of]
        y_rows = [b.add(y, b.mul(row, y_stride)) for row in row_of]
        blocks = b.udiv(b.add(width, I64(self._width - 1)), I64(self._width))
        padded = b.mul(blocks, I64(VECTOR_BYTES))
        mine_x = [self._at(b, scratch_x, b.mul(padded, I64(i))) for i in range(rows)]
        mine_h = [self._at(b, scratch_h, b.mul(h_stride, I64(i))) for i in range(rows)]
        self._copy_rows(b, x_rows, mine_x, blocks, width)
        a, a_rows, parts, num_parts = (b.load(b.gep(tile, [I64(f)], source_etype=I64), typ=I64) for f in range(2, 6))
        self._shrink(b, (b.inttoptr(a, PTR), a_rows, padded, blocks), mine_x, mine_h, weight)

        def expand(p: Value, _: list[Value]) -> list[Value]:
            part = b.gep(b.inttoptr(parts, PTR), [b.mul(p, I64(PART_FIELDS))], source_etype=I64)
            fields = [b.load(b.gep(part, [I64(f)], source_etype=I64), typ=I64) for f in range(PART_FIELDS)]
            self._expand(b, fields, mine_h, y_rows)
            return []

        _for(b, num_parts, (), expand)
        b.ret_void()
        return function

    def _copy_rows(self, b: Value, sources: list[Value], targets: list[Value], blocks: Value, width: Value) -> None:
        """x into scratch, zeros after its end."""

        def copy(block: Value, _: list[Value]) -> list[Value]:
            offset = b.mul(block, I64(VECTOR_BYTES))
            mask = self._mask(b, b.mul(block, I64(self._width)), width, self._width)
            for source, target in zip(sources, targets, strict=True):
                value = self._load_masked(b, self._at(b, source, offset), mask, self._stored)
                b.store(value, self._at(b, target, offset), align=1)
            return []

        _for(b, blocks, (), copy)

    def _shrink(
        self, b: Value, a: tuple[Value, Value, Value, Value], xs: list[Value], hs: list[Value], weight: Value
    ) -> None:
        """``h[i, j] = weight * x[i] . A[j]``, two j at a time."""
        address, a_rows, padded, blocks = a
        zeros = [ir.Constant(self._sum, None)] * (2 * len(xs))

        def two_rows(pair: Value, _: list[Value]) -> list[Value]:
            first = self._at(b, address, b.mul(pair, b.mul(padded, I64(2))))
            second = self._at(b, first, padded)

            def along(block: Value, sums: list[Value]) -> list[Value]:
                offset = b.mul(block, I64(VECTOR_BYTES))
                for row in (first, second):
                    self._prefetch(b, self._at(b, row, offset))
                factors = [self._load(b, row, offset, self._stored) for row in (first, second)]
                rows = [self._load(b, x, offset, self._stored) for x in xs]
                return [self._mac(b, sums[2 * i + j], rows[i], factors[j]) for i in range(len(xs)) for j in range(2)]

            sums = _for(b, blocks, zeros, along)
            for i, h in enumerate(hs):
                for j in range(2):
                    value = b.fmul(self._total(b, sums[2 * i + j]), weight)
                    if self._bf:
                        value = b.fptrunc(value, self._element)
                    place = b.add(b.mul(pair, I64(2)), I64(j))
                    b.store(value, self._at(b, h, b.mul(place, I64(self._item))), align=1)
            return []

        _for(b, b.lshr(a_rows, I64(1)), (), two_rows)

    def _expand(self, b: Value, part: list[Value], hs: list[Value], y_rows: list[Value]) -> None:
        """``y[i, column : column+size] += h[i, first : first + 2*pairs] @ B``, 16 columns at a time."""
        first, pairs, matrix, column, size = part
        mine = [self._at(b, h, b.mul(first, I64(self._item))) for h in hs]
        pair_bytes = 2 * LANES * self._item
        block_bytes = b.mul(pairs, I64(pair_bytes))

        def columns(block: Value, _: list[Value]) -> list[Value]:
            begin = b.mul(block, I64(LANES))
            mask = self._mask(b, begin, size, LANES)
            offset = b.mul(b.add(column, begin), I64(self._item))
            places = [b.inttoptr(b.add(row, offset), PTR) for row in y_rows]
            sums = [self._load_masked(b, place, mask, self._columns) for place in places]
            if self._bf:
                sums = [b.fpext(value, self._sum) for value in sums]
            here = self._at(b, b.inttoptr(matrix, PTR), b.mul(block, block_bytes))

            def along(pair: Value, sums: list[Value]) -> list[Value]:
                factors = self._at(b, here, b.mul(pair, I64(pair_bytes)))
                for line in range(0, pair_bytes, VECTOR_BYTES):
                    self._prefetch(b, self._at(b, factors, I64(line)))
                return self._add_pair(b, sums, mine, pair, factors)

            sums = _for(b, pairs, sums, along)
            for value, place in zip(sums, places, strict=True):
                self._store_masked(b, b.fptrunc(value, self._columns) if self._bf else value, place, mask)
            return []

        _for(b, b.udiv(b.add(size, I64(LANES - 1)), I64(LANES)), (), columns)

    def _add_pair(self, b: Value, sums: list[Value], hs: list[Value], pair: Value, factors: Value) -> list[Value]:
        """Two ranks' contribution to 16 columns of each row."""
        offset = b.mul(pair, I64(2 * self._item))
        if self._bf:
            both = b.load(factors, typ=self._stored, align=1)
            words = [self._splat(b, self._load(b, h, offset, I32), LANES) for h in hs]
            return [self._mac(b, s, b.bitcast(w, self._stored), both) for s, w in zip(sums, words, strict=True)]
        for j in range(2):
            one = self._load(b, factors, I64(j * VECTOR_BYTES), self._stored)
            at = b.add(offset, I64(j * self._item))
            sums = [
                self._mac(b, s, self._splat(b, self._load(b, h, at, F32), LANES), one)
                for s, h in zip(sums, hs, strict=True)
            ]
        return sums

    def _loop_over_tiles(self, tile_functions: dict[int, Value]) -> None:
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [I64] * 11), "add_segments")
        x, y, x_stride, y_stride, width, tiles, num_tiles, weights, scratch_x, scratch_h, h_stride = function.args
        b = ir.IRBuilder(function.append_basic_block())
        scratch = [b.inttoptr(scratch_x, PTR), b.inttoptr(scratch_h, PTR), h_stride]

        def one_tile(t: Value, _: list[Value]) -> list[Value]:
            tile = b.gep(b.inttoptr(tiles, PTR), [b.mul(t, I64(TILE_FIELDS))], source_etype=I64)
            start, stop = (b.load(b.gep(tile, [I64(f)], source_etype=I64), typ=I64) for f in range(2))
            weight = b.load(b.gep(b.inttoptr(weights, PTR), [t], source_etype=F32), typ=F32)

            def some_rows(block: Value, _: list[Value]) -> list[Value]:
                first = b.add(start, b.mul(block, I64(BLOCK_ROWS)))
                left = b.sub(stop, first)
                count = b.select(b.icmp_unsigned("<", left, I64(BLOCK_ROWS)), left, I64(BLOCK_ROWS))
                x_here, y_here = b.add(x, b.mul(first, x_stride)), b.add(y, b.mul(first, y_stride))
                done = b.append_basic_block("rows_done")
                for rows, tile_function in tile_functions.items():
                    fits, more = b.append_basic_block("fits"), b.append_basic_block("more")
                    b.cbranch(b.icmp_unsigned("<=", count, I64(rows)), fits, more)
                    b.position_at_end(fits)
                    b.call(tile_function, [x_here, y_here, x_stride, y_stride, count, width, tile, weight, *scratch])
                    b.branch(done)
                    b.position_at_end(more)
                b.unreachable()
                b.position_at_end(done)
                return []

            blocks = b.udiv(b.add(b.sub(stop, start), I64(BLOCK_ROWS - 1)), I64(BLOCK_ROWS))
            _for(b, blocks, (), some_rows)
            return []

        _for(b, num_tiles, (), one_tile)
        b.ret_void()
