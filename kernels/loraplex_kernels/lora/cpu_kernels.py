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

import functools
from typing import Final

import torch
from llvmlite import ir

from loraplex_kernels.cpu_ir import F32, I32, I64, PTR, Kernel, Pieces, Value, compile_function, loop
from loraplex_kernels.lanes import LANES, VECTOR_BYTES
from loraplex_kernels.lora.cpu_factors import BLOCK_ROWS

#: int64 fields of a tile and of a part, in the order the kernel reads them
TILE_FIELDS: Final = 6  # first row, last row + 1, address of A, rows of A, address of its first part, parts
PART_FIELDS: Final = 5  # first row of A, pairs of ranks, address of B, column of y, size


@functools.cache  # the code is the same each time
def compile_kernel(dtype: torch.dtype) -> Kernel:
    """``add_segments(x, y, x_stride, y_stride, in, tiles, num_tiles, weights, scratch_x, scratch_h, h_stride)``.

    Addresses and strides are in bytes. tiles: int64 ``[n, TILE_FIELDS]``; parts: int64 ``[m, PART_FIELDS]``; weights:
    float32 ``[n]``; scratch_x holds ``BLOCK_ROWS`` padded rows of x, scratch_h as many rows of A x. The caller keeps
    every address alive and has checked every size.
    """
    return compile_function(_Source(dtype is torch.bfloat16).module, "add_segments")


class _Source(Pieces):
    """The module's text: one ``tile`` function for each number of rows, and the loop over tiles."""

    def __init__(self, bfloat16: bool) -> None:
        super().__init__(bfloat16)
        tiles = {rows: self._tile(rows) for rows in (1, 2, 4, BLOCK_ROWS)}
        self._loop_over_tiles(tiles)

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
        blocks = b.udiv(b.add(width, I64(self.width - 1)), I64(self.width))
        padded = b.mul(blocks, I64(VECTOR_BYTES))
        mine_x = [self.at(b, scratch_x, b.mul(padded, I64(i))) for i in range(rows)]
        mine_h = [self.at(b, scratch_h, b.mul(h_stride, I64(i))) for i in range(rows)]
        self._copy_rows(b, x_rows, mine_x, blocks, width)
        a, a_rows, parts, num_parts = (b.load(b.gep(tile, [I64(f)], source_etype=I64), typ=I64) for f in range(2, 6))
        self._shrink(b, (b.inttoptr(a, PTR), a_rows, padded, blocks), mine_x, mine_h, weight)

        def expand(p: Value, _: list[Value]) -> list[Value]:
            part = b.gep(b.inttoptr(parts, PTR), [b.mul(p, I64(PART_FIELDS))], source_etype=I64)
            fields = [b.load(b.gep(part, [I64(f)], source_etype=I64), typ=I64) for f in range(PART_FIELDS)]
            self._expand(b, fields, mine_h, y_rows)
            return []

        loop(b, num_parts, (), expand)
        b.ret_void()
        return function

    def _copy_rows(self, b: Value, sources: list[Value], targets: list[Value], blocks: Value, width: Value) -> None:
        """x into scratch, zeros after its end."""

        def copy(block: Value, _: list[Value]) -> list[Value]:
            offset = b.mul(block, I64(VECTOR_BYTES))
            mask = self.mask(b, b.mul(block, I64(self.width)), width, self.width)
            for source, target in zip(sources, targets, strict=True):
                value = self.load_masked(b, self.at(b, source, offset), mask, self.stored)
                b.store(value, self.at(b, target, offset), align=1)
            return []

        loop(b, blocks, (), copy)

    def _shrink(
        self, b: Value, a: tuple[Value, Value, Value, Value], xs: list[Value], hs: list[Value], weight: Value
    ) -> None:
        """``h[i, j] = weight * x[i] . A[j]``, two j at a time."""
        address, a_rows, padded, blocks = a
        zeros = [ir.Constant(self.sum, None)] * (2 * len(xs))

        def two_rows(pair: Value, _: list[Value]) -> list[Value]:
            first = self.at(b, address, b.mul(pair, b.mul(padded, I64(2))))
            second = self.at(b, first, padded)

            def along(block: Value, sums: list[Value]) -> list[Value]:
                offset = b.mul(block, I64(VECTOR_BYTES))
                for row in (first, second):
                    self.prefetch(b, self.at(b, row, offset))
                factors = [self.load(b, row, offset, self.stored) for row in (first, second)]
                rows = [self.load(b, x, offset, self.stored) for x in xs]
                return [self.mac(b, sums[2 * i + j], rows[i], factors[j]) for i in range(len(xs)) for j in range(2)]

            sums = loop(b, blocks, zeros, along)
            for i, h in enumerate(hs):
                for j in range(2):
                    value = b.fmul(self.total(b, sums[2 * i + j]), weight)
                    if self.bf:
                        value = b.fptrunc(value, self.element)
                    place = b.add(b.mul(pair, I64(2)), I64(j))
                    b.store(value, self.at(b, h, b.mul(place, I64(self.item))), align=1)
            return []

        loop(b, b.lshr(a_rows, I64(1)), (), two_rows)

    def _expand(self, b: Value, part: list[Value], hs: list[Value], y_rows: list[Value]) -> None:
        """``y[i, column : column+size] += h[i, first : first + 2*pairs] @ B``, 16 columns at a time."""
        first, pairs, matrix, column, size = part
        mine = [self.at(b, h, b.mul(first, I64(self.item))) for h in hs]
        pair_bytes = 2 * LANES * self.item
        block_bytes = b.mul(pairs, I64(pair_bytes))

        def columns(block: Value, _: list[Value]) -> list[Value]:
            begin = b.mul(block, I64(LANES))
            mask = self.mask(b, begin, size, LANES)
            offset = b.mul(b.add(column, begin), I64(self.item))
            places = [b.inttoptr(b.add(row, offset), PTR) for row in y_rows]
            sums = [self.load_masked(b, place, mask, self.columns) for place in places]
            if self.bf:
                sums = [b.fpext(value, self.sum) for value in sums]
            here = self.at(b, b.inttoptr(matrix, PTR), b.mul(block, block_bytes))

            def along(pair: Value, sums: list[Value]) -> list[Value]:
                factors = self.at(b, here, b.mul(pair, I64(pair_bytes)))
                for line in range(0, pair_bytes, VECTOR_BYTES):
                    self.prefetch(b, self.at(b, factors, I64(line)))
                return self._add_pair(b, sums, mine, pair, factors)

            sums = loop(b, pairs, sums, along)
            for value, place in zip(sums, places, strict=True):
                self.store_masked(b, b.fptrunc(value, self.columns) if self.bf else value, place, mask)
            return []

        loop(b, b.udiv(b.add(size, I64(LANES - 1)), I64(LANES)), (), columns)

    def _add_pair(self, b: Value, sums: list[Value], hs: list[Value], pair: Value, factors: Value) -> list[Value]:
        """Two ranks' contribution to 16 columns of each row."""
        offset = b.mul(pair, I64(2 * self.item))
        if self.bf:
            both = b.load(factors, typ=self.stored, align=1)
            words = [self.splat(b, self.load(b, h, offset, I32), LANES) for h in hs]
            return [self.mac(b, s, b.bitcast(w, self.stored), both) for s, w in zip(sums, words, strict=True)]
        for j in range(2):
            one = self.load(b, factors, I64(j * VECTOR_BYTES), self.stored)
            at = b.add(offset, I64(j * self.item))
            sums = [
                self.mac(b, s, self.splat(b, self.load(b, h, at, F32), LANES), one)
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
            loop(b, blocks, (), some_rows)
            return []

        loop(b, num_tiles, (), one_tile)
        b.ret_void()
