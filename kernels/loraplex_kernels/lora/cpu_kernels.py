"""The low-rank product over small segments, compiled for this processor by numba when it is first used.

A library call costs more than the arithmetic of a decode: 13 us before a bfloat16 product begins, for eight rows of
rank 16. Here one call does all segments of a layer, each with its own factors, in float32, and rounds y once per term.
bfloat16 has no numpy type, so its bits travel as uint16.

Reassociation and fused multiply-add are allowed, because vectors need them; NaN and Inf are not assumed away.
"""

# numba's decorators have no types
# mypy: disable-error-code="untyped-decorator, no-any-return, no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

#: rows that share one pass over a slot's factors: as many sums as fit the vector registers
BLOCK_ROWS = 8
#: columns of y summed at a time, so that eight float32 rows of them stay in the first-level cache
BLOCK_COLUMNS = 512

_MATH = {"reassoc", "contract", "nsz"}


@intrinsic
def _pointer(typing, address):
    """An address as a pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


def _wide(value):
    """A stored value as float32."""


@overload(_wide, inline="always")
def _wide_of(value):
    if isinstance(value, types.Integer):
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


def _put(row, sums, count):
    """``row[:count] = sums[:count]`` in row's type, rounded to nearest even; a NaN stays one."""


@overload(_put)
def _put_of(row, sums, count):
    if isinstance(row.dtype, types.Integer):

        def put_bfloat16(row, sums, count):
            for c in range(count):
                value = np.float32(sums[c])
                bits = np.uint32(value.view(np.uint32))
                odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
                rounded = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
                row[c] = rounded if value == value else np.uint16(0x7FC0)

        return put_bfloat16

    def put_float32(row, sums, count):
        for c in range(count):
            row[c] = sums[c]

    return put_float32


@njit(fastmath=_MATH, error_model="numpy", cache=True)
def _widen(row, out, count):
    for c in range(count):
        out[c] = _wide(row[c])


@njit(fastmath=_MATH, error_model="numpy", cache=True)
def _dot8(x0, x1, x2, x3, x4, x5, x6, x7, a, count):
    zero = np.float32(0)
    s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
    for k in range(count):
        w = _wide(a[k])
        s0 += x0[k] * w
        s1 += x1[k] * w
        s2 += x2[k] * w
        s3 += x3[k] * w
        s4 += x4[k] * w
        s5 += x5[k] * w
        s6 += x6[k] * w
        s7 += x7[k] * w
    return s0, s1, s2, s3, s4, s5, s6, s7


@njit(fastmath=_MATH, error_model="numpy", cache=True)
def _dot1(x0, a, count):
    total = np.float32(0)
    for k in range(count):
        total += x0[k] * _wide(a[k])
    return total


@njit(fastmath=_MATH, error_model="numpy", cache=True)
def _shrink(x, a, weight, num_rows, h):
    """``h[i, j] = weight * x[i] . a[j]`` for the first ``num_rows`` of x ``[8, in]``."""
    count = a.shape[1]
    if num_rows < 3:
        for i in range(num_rows):
            for j in range(a.shape[0]):
                h[i, j] = weight * _dot1(x[i], a[j], count)
        return
    for j in range(a.shape[0]):
        s0, s1, s2, s3, s4, s5, s6, s7 = _dot8(x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], a[j], count)
        h[0, j], h[1, j], h[2, j], h[3, j] = weight * s0, weight * s1, weight * s2, weight * s3
        h[4, j], h[5, j], h[6, j], h[7, j] = weight * s4, weight * s5, weight * s6, weight * s7


@njit(fastmath=_MATH, error_model="numpy", cache=True)
def _add4(sums, b0, b1, b2, b3, h, count):
    h0, h1, h2, h3 = h[0], h[1], h[2], h[3]
    for c in range(count):
        sums[c] += h0 * _wide(b0[c]) + h1 * _wide(b1[c]) + h2 * _wide(b2[c]) + h3 * _wide(b3[c])


@njit(fastmath=_MATH, error_model="numpy", cache=True)
def _add1(sums, b0, h0, count):
    for c in range(count):
        sums[c] += h0 * _wide(b0[c])


@njit(fastmath=_MATH, error_model="numpy", cache=True)
def _expand(h, b, y, num_rows, sums):
    """``y[i] += h[i] @ b`` with h ``[8, r]``, b ``[r, size]``, y ``[num_rows, size]``."""
    rank, size = b.shape
    for first in range(0, size, BLOCK_COLUMNS):
        last = min(size, first + BLOCK_COLUMNS)
        count = last - first
        for i in range(num_rows):
            _widen(y[i, first:last], sums[i], count)
        whole = rank - rank % 4
        for j in range(0, whole, 4):
            for i in range(num_rows):
                _add4(
                    sums[i],
                    b[j, first:last],
                    b[j + 1, first:last],
                    b[j + 2, first:last],
                    b[j + 3, first:last],
                    h[i, j : j + 4],
                    count,
                )
        for j in range(whole, rank):
            for i in range(num_rows):
                _add1(sums[i], b[j, first:last], h[i, j], count)
        for i in range(num_rows):
            _put(y[i, first:last], sums[i], count)


@njit(error_model="numpy", cache=True, nogil=True)
def add_segments(rows, shape, tiles, weights, parts, scratch, like):
    """Every tile's product, in place on y.

    rows: int64 ``[x address, y address, x row stride, y row stride]``, strides in elements; shape: ``(in, width)``.
    tiles: int64 ``[n, 6]`` = first row, last row + 1, address of A, its rows, first part, last part + 1.
    weights: float32 ``[n]``. parts: int64 ``[m, 5]`` = first row of A, rank, address of B transposed, column, size.
    scratch: float32 ``x [8, in]``, ``h [8, rows of the largest A]``, ``sums [8, BLOCK_COLUMNS]``.
    like: an array of the stored type; only its type is read.
    """
    width_in, width_out = shape
    x32, h, sums = scratch
    item = like.itemsize
    for t in range(tiles.shape[0]):
        a = carray(_pointer(tiles[t, 2]), (tiles[t, 3], width_in), like.dtype)
        for first in range(tiles[t, 0], tiles[t, 1], BLOCK_ROWS):
            count = min(tiles[t, 1] - first, BLOCK_ROWS)
            for i in range(count):
                address = rows[0] + (first + i) * rows[2] * item
                _widen(carray(_pointer(address), (width_in,), like.dtype), x32[i], width_in)
            _shrink(x32, a, weights[t], count, h)
            for p in range(tiles[t, 4], tiles[t, 5]):
                start, rank, column, size = parts[p, 0], parts[p, 1], parts[p, 3], parts[p, 4]
                b = carray(_pointer(parts[p, 2]), (rank, size), like.dtype)
                address = rows[1] + (first * rows[3] + column) * item
                y = carray(_pointer(address), (count, rows[3]), like.dtype)
                _expand(h[:, start : start + rank], b, y[:, :size], count, sums)
