"""Products with quantized matrices on a GPU: the kernels. Tiles and launches are in the ``device_*`` files.

One family for every stored form: what a form is made of (bits, values, groups, scales, rounding) is known when a
kernel is compiled, ``_weights`` decodes exactly as ``stored.decode`` does, and a launch loops over items of one column
tile and one split of K. Codes and scales of the next K tile are on their way while one is decoded and multiplied.

No float atomics: each split stores its sums once, to a plane of its own, and the last program at a column tile, known
by a counter, adds the planes up in their order and stores y. Why it then sees them is said in ``lora/triton.py``;
counters are zero between launches.

``_joined`` is one launch for a layer and its adapters: the shrink items of ``lora/triton.py``, the product's items,
then the expand items, each of which waits for its tile of y and for its pairs. Every program does all its items of the
first two kinds, which wait for nothing, before its first wait, and all programs are resident: so every wait ends, as
that of the fused launch does. y has the bits that two launches give it: the same items store it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loraplex_kernels.lora.triton import COLUMN, _await, _expand_item, _lanes, _shrink_item, unfit
from loraplex_kernels.lora.uploads import queue_for
from loraplex_kernels.quant import device_layout as layout
from loraplex_kernels.quant.device import DeviceQuant
from loraplex_kernels.quant.device_launch import KernelSet, QuantKernels

PLACE: tl.constexpr = tl.constexpr(layout.PLACE_WORDS)
#: float32 of 2^23 with an integer below 2^23 in its low bits is 2^23 more than that integer
MAGIC: tl.constexpr = tl.constexpr(0x4B000000)


@triton.jit
def _codes(at, ok, BITS: tl.constexpr):
    """The bytes of units; of 6 bits three tensors: low halves of even pieces, of odd ones, the high bits of all."""
    first = tl.load(at, mask=ok, other=0)
    if BITS == 6:
        return first, tl.load(at + 16, mask=ok, other=0), tl.load(at + 32, mask=ok, other=0)
    else:
        return first, first, first


@triton.jit
def _code(even, odd, high, piece: tl.constexpr, BITS: tl.constexpr):
    """The codes of one piece of each unit, int32."""
    if BITS == 8:
        return even.to(tl.int32)
    elif BITS == 4:
        return (even.to(tl.int32) >> (4 * piece)) & 15
    else:
        low = even if piece % 2 == 0 else odd
        return ((low.to(tl.int32) >> (4 * (piece // 2))) & 15) | (((high.to(tl.int32) >> (2 * piece)) & 3) << 4)


@triton.jit
def _first_columns(units, BITS: tl.constexpr):
    """Where units begin."""
    if BITS == 4:  # the halves of a run: columns 0 to 15 and 32 to 47, columns 16 to 31 and 48 to 63
        return units // 2 * 64 + units % 2 * 16
    else:
        return units * (64 if BITS == 6 else 16)


@triton.jit
def _numbers(code, table, VALUES: tl.constexpr, ZERO: tl.constexpr):
    """``stored.numbers``: what codes stand for, less the scheme's zero, float32."""
    if VALUES == "table":
        return tl.load(table + code)
    elif VALUES == "e4m3":
        bits = code & 127
        value = (((code & 128) << 24) | (bits << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        return tl.where(bits == 127, float("nan"), value)
    elif VALUES == "int8":
        return ((code ^ 128) | MAGIC).to(tl.float32, bitcast=True) - (8388608.0 + 128.0 + ZERO)
    else:
        return (code | MAGIC).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)


@triton.jit
def _grid_words(
    row, in_part, column, ok, g0, g1, g2, g3, groups, in_features, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr,
    SCALES: tl.constexpr,
):  # fmt: skip
    """What the scales at some columns are made of, as it is stored (``Stack.grids``): four tensors, some the same."""
    group = column // GROUP if GROUP else column * 0
    at = (row // GROUP_ROWS).to(tl.int64) * groups + group
    inner = tl.load(g0 + at, mask=ok, other=0)
    if SCALES == "plain":
        zeros = tl.load(g1 + at, mask=ok, other=0) if g1 is not None else inner
        shifts = tl.load(g2 + at, mask=ok, other=0) if g2 is not None else inner
        return inner, zeros, shifts, inner
    elif SCALES == "super":
        outer_at = row.to(tl.int64) * (in_features // 256) + column // 256
        outer = tl.load(g1 + outer_at, mask=ok, other=0)
        mins = tl.load(g2 + at, mask=ok, other=0) if g2 is not None else inner
        outer_mins = tl.load(g3 + outer_at, mask=ok, other=0) if g3 is not None else outer
        return inner, outer, mins, outer_mins
    else:
        block = tl.load(g3) + in_part * tl.load(g3 + 1) + group
        outer = tl.load(g2 + tl.load(g3 + 2) + block // 256, mask=ok, other=0)
        return inner, outer, inner, outer


@triton.jit
def _scales_of(inner, second, third, fourth, g1, g3, SCALES: tl.constexpr):
    """Scales, zeros and shifts from ``_grid_words``, float32; what a form has none of is not to be used."""
    if SCALES == "plain":
        return inner.to(tl.float32), second.to(tl.float32), third.to(tl.float32)
    elif SCALES == "super":
        scale = second.to(tl.float32) * inner.to(tl.float32)
        return scale, scale, -(fourth.to(tl.float32) * third.to(tl.float32))
    else:
        scale = tl.load(g1 + inner.to(tl.int32)) * second + tl.load(g3 + 3).to(tl.float32, bitcast=True)
        return scale, scale, scale


@triton.jit
def _weights(
    code, scale, zero, shift, table, dtype: tl.constexpr, VALUES: tl.constexpr, ZERO: tl.constexpr,
    FACTOR: tl.constexpr, ZEROS: tl.constexpr, SHIFTS: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """``stored.decode``, in the same order and with no two steps in one: launches forbid fused multiply-adds."""
    value = _numbers(code, table, VALUES, ZERO)
    if ZEROS:
        value = value - zero
    value = value * scale
    if FACTOR != 1.0:
        value = value * FACTOR
    if SHIFTS:
        value = value + shift
    if ROUNDED == "fp16":
        value = value.to(tl.float16).to(tl.float32)
    elif ROUNDED == "bf16" and dtype != tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, even.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def _x_piece(x_rows, k, stop, ok, piece: tl.constexpr, BITS: tl.constexpr, UNITS: tl.constexpr, EVEN: tl.constexpr):
    """The columns of x that one piece of each unit is multiplied by."""
    lanes = tl.arange(0, UNITS * 16)
    first = k + _first_columns(lanes // 16, BITS)
    columns = first + piece * (32 if BITS == 4 else 16) + lanes % 16
    inside = first < stop if EVEN else columns < stop
    return tl.load(x_rows + columns[None, :], mask=ok[:, None] & inside[None, :], other=0.0)


@triton.jit
def _sums(
    x, x_rows, row_ok, k_first, stop, row, in_part, n_ok, codes, table, g0, g1, g2, g3, row_bytes, groups, in_features,
    BITS: tl.constexpr, VALUES: tl.constexpr, ZERO: tl.constexpr, FACTOR: tl.constexpr, ROUNDED: tl.constexpr,
    GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, SCALES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One split of K of a tile of y, float32."""
    dtype: tl.constexpr = x.dtype.element_ty
    UNIT: tl.constexpr = 64 if BITS == 6 else 128 // BITS
    UNIT_BYTES: tl.constexpr = 48 if BITS == 6 else 16
    STEP: tl.constexpr = 32 if BITS == 4 else 16
    ZEROS: tl.constexpr = SCALES == "plain" and g1 is not None
    SHIFTS: tl.constexpr = SCALES != "nested" and g2 is not None
    # pieces of one group share its scale; two that do not are asked for ahead, too; four would take too much to keep
    SHARED: tl.constexpr = GROUP % (16 if BITS == 8 else 64) == 0
    AHEAD: tl.constexpr = SHARED or BITS == 4
    first = _first_columns(tl.arange(0, UNITS)[None, :, None], BITS)
    code_rows = codes + row.to(tl.int64) * row_bytes
    code_rows += tl.arange(0, UNITS)[None, :, None] * UNIT_BYTES + tl.arange(0, 16)[None, None, :]
    grid = _first_columns(tl.arange(0, UNITS if GROUP else 1)[None, :, None], BITS)
    grid += tl.arange(0, 16 if GROUP % 16 else 1)[None, None, :]
    even, odd, high = _codes(code_rows + k_first // UNIT * UNIT_BYTES, n_ok & (k_first + first < stop), BITS)
    if AHEAD:
        at = k_first + grid
        a, b, c, d = _grid_words(
            row, in_part, at, n_ok & (at < stop), g0, g1, g2, g3, groups, in_features, GROUP, GROUP_ROWS, SCALES
        )
        if not SHARED:
            at += STEP
            e, f, g, h = _grid_words(
                row, in_part, at, n_ok & (at < stop), g0, g1, g2, g3, groups, in_features, GROUP, GROUP_ROWS, SCALES
            )
    acc = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for k in tl.range(k_first, stop, UNITS * UNIT, num_stages=1):
        now_even, now_odd, now_high = even, odd, high
        after = k + UNITS * UNIT
        even, odd, high = _codes(code_rows + after // UNIT * UNIT_BYTES, n_ok & (after + first < stop), BITS)
        if AHEAD:
            scale, zero, shift = _scales_of(a, b, c, d, g1, g3, SCALES)
            at = after + grid
            a, b, c, d = _grid_words(
                row, in_part, at, n_ok & (at < stop), g0, g1, g2, g3, groups, in_features, GROUP, GROUP_ROWS, SCALES
            )
        for piece in tl.static_range(8 // BITS if BITS != 6 else 4):
            x_tile = _x_piece(x_rows, k, stop, row_ok, piece, BITS, UNITS, EVEN)
            if not SHARED and (piece > 0 or not AHEAD):
                at = k + grid + piece * STEP
                if AHEAD:
                    scale, zero, shift = _scales_of(e, f, g, h, g1, g3, SCALES)
                    at = after + grid + STEP
                e, f, g, h = _grid_words(
                    row, in_part, at, n_ok & (at < stop), g0, g1, g2, g3, groups, in_features, GROUP, GROUP_ROWS,
                    SCALES,
                )  # fmt: skip
                if not AHEAD:
                    scale, zero, shift = _scales_of(e, f, g, h, g1, g3, SCALES)
            code = _code(now_even, now_odd, now_high, piece, BITS)
            weights = _weights(code, scale, zero, shift, table, dtype, VALUES, ZERO, FACTOR, ZEROS, SHIFTS, ROUNDED)
            acc = tl.dot(x_tile, tl.trans(tl.reshape(weights, [BLOCK_N, UNITS * 16])), acc, input_precision="ieee")
    return acc


@triton.jit
def _reduced(acc, at, ok, plane, counter, split, SPLITS: tl.constexpr):
    """The sums of all splits and True, for whichever program brings the last of them; the others get False."""
    if SPLITS == 1:
        return acc, True
    else:
        tl.store(at + split * plane, acc, mask=ok)
        tl.debug_barrier()
        is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if is_last:
            tl.debug_barrier()
            acc = tl.load(at, mask=ok, other=0.0, cache_modifier=".cg")
            for index in tl.static_range(1, SPLITS):
                acc += tl.load(at + index * plane, mask=ok, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
        return acc, is_last


@triton.jit
def _tile(
    item, x, codes, table, g0, g1, g2, g3, columns, planes, counters, num_columns, num_rows, x_stride, width, row_bytes,
    groups, in_features, chunk, BITS: tl.constexpr, VALUES: tl.constexpr, ZERO: tl.constexpr, FACTOR: tl.constexpr,
    ROUNDED: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, SCALES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, UNITS: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One item of a product: its sums, and whether they are a whole tile's; that tile's rows of x, column tile of y."""
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    first_row = item % row_tiles * BLOCK_M
    split = item // row_tiles % SPLITS
    index = item // row_tiles // SPLITS
    column = columns + index * COLUMN
    part = tl.load(column)
    first = tl.load(column + 1)
    y_first = tl.load(column + 2)
    if ALIGNED:
        y_first = tl.multiple_of(y_first, 16)
    rows = first_row + tl.arange(0, BLOCK_M)
    row_ok = rows < num_rows
    ns = tl.arange(0, BLOCK_N)
    n_ok = first + ns < tl.load(column + 3)
    if SCALES == "nested":
        g1 += part * 256
        g3 += part * PLACE
    acc = _sums(
        x, x + rows.to(tl.int64)[:, None] * x_stride, row_ok, split * chunk,
        tl.minimum((split + 1) * chunk, in_features), (y_first + ns)[:, None, None], (first + ns)[:, None, None],
        n_ok[:, None, None], codes, table, g0, g1, g2, g3, row_bytes, groups, in_features, BITS, VALUES, ZERO, FACTOR,
        ROUNDED, GROUP, GROUP_ROWS, SCALES, BLOCK_M, BLOCK_N, UNITS, EVEN,
    )  # fmt: skip
    at = rows.to(tl.int64)[:, None] * width + (y_first + ns)[None, :]
    ok = row_ok[:, None] & n_ok[None, :]
    acc, whole = _reduced(acc, planes + at, ok, num_rows.to(tl.int64) * width, counters + index, split, SPLITS)
    return acc, whole, rows, index


@triton.jit
def _put(total, y, bias, rows, num_rows, column, width, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """Store a tile of y, its bias added."""
    ns = tl.arange(0, BLOCK_N)
    n_ok = tl.load(column + 1) + ns < tl.load(column + 3)
    y_first = tl.load(column + 2)
    if ALIGNED:
        y_first = tl.multiple_of(y_first, 16)
    ns += y_first
    if bias is not None:
        total += tl.load(bias + ns, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    at = rows.to(tl.int64)[:, None] * width + ns[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(rows < num_rows)[:, None] & n_ok[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _product(
    y, x, bias, codes, table, g0, g1, g2, g3, columns, planes, counters, num_columns, num_rows, x_stride, width,
    row_bytes, groups, in_features, chunk, BITS: tl.constexpr, VALUES: tl.constexpr, ZERO: tl.constexpr,
    FACTOR: tl.constexpr, ROUNDED: tl.constexpr, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    num_items = tl.cdiv(num_rows, BLOCK_M) * num_columns * SPLITS
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        total, whole, rows, index = _tile(
            item, x, codes, table, g0, g1, g2, g3, columns, planes, counters, num_columns, num_rows, x_stride, width,
            row_bytes, groups, in_features, chunk, BITS, VALUES, ZERO, FACTOR, ROUNDED, GROUP, GROUP_ROWS, SCALES,
            BLOCK_M, BLOCK_N, UNITS, SPLITS, EVEN, ALIGNED,
        )  # fmt: skip
        if whole:
            _put(total, y, bias, rows, num_rows, columns + index * COLUMN, width, BLOCK_N, ALIGNED)


@triton.jit(do_not_specialize=["num_rows"])
def _joined(
    y, x, bias, codes, table, g0, g1, g2, g3, columns, planes, counters, num_columns, num_rows, x_stride, width,
    row_bytes, groups, in_features, chunk, own_x, own_stride, meta, root, header, BITS: tl.constexpr,
    VALUES: tl.constexpr, ZERO: tl.constexpr, FACTOR: tl.constexpr, ROUNDED: tl.constexpr, GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr, SCALES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNITS: tl.constexpr,
    SPLITS: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr, PLANES: tl.constexpr,
    CHUNK: tl.constexpr, PAIR_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    MAX_LANES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """``x`` is what the matrix multiplies, ``own_x`` what the adapters do; ``PLANES``, ``CHUNK``: the table's."""
    num_tiles = tl.load(meta)
    num_pairs = tl.load(meta + 1)
    lanes = _lanes(num_pairs, tl.num_programs(0), PLANES, MAX_LANES)
    for item in range(tl.program_id(0), num_pairs * PLANES * lanes, tl.num_programs(0)):
        _shrink_item(
            item, lanes, own_x, meta, root, header, own_stride, in_features, PARTS, PLANES, CHUNK, PAIR_ROWS, BLOCK_R,
            BLOCK_K, FUSED=True,
        )  # fmt: skip
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    stored = counters + num_columns
    for item in range(tl.program_id(0), row_tiles * num_columns * SPLITS, tl.num_programs(0)):
        total, whole, rows, index = _tile(
            item, x, codes, table, g0, g1, g2, g3, columns, planes, counters, num_columns, num_rows, x_stride, width,
            row_bytes, groups, in_features, chunk, BITS, VALUES, ZERO, FACTOR, ROUNDED, GROUP, GROUP_ROWS, SCALES,
            BLOCK_M, BLOCK_N, UNITS, SPLITS, EVEN, ALIGNED,
        )  # fmt: skip
        if whole:
            _put(total, y, bias, rows, num_rows, columns + index * COLUMN, width, BLOCK_N, ALIGNED)
            tl.debug_barrier()
            if num_tiles > 0:  # else nobody would put it back
                tl.atomic_add(stored + 2 * index, 1, sem="release", scope="gpu")
    for item in range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0)):
        _await(stored + 2 * (item % num_columns), row_tiles, num_tiles)
        _expand_item(
            item, lanes, y, meta, meta, root, header, columns, num_columns, width, in_features, PARTS, PLANES,
            PAIR_ROWS, BLOCK_N, BLOCK_C, BLOCK_R, ALIGNED, AHEAD, LOOKUP=False, FUSED=True,
        )  # fmt: skip


@triton.jit
def _rows(
    out, indices, codes, table, g0, g1, g2, g3, start, first, size, row_bytes, groups, num_rows, in_features,
    BITS: tl.constexpr, VALUES: tl.constexpr, ZERO: tl.constexpr, FACTOR: tl.constexpr, ROUNDED: tl.constexpr,
    GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, SCALES: tl.constexpr, BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """Rows of one part, decoded: all of them, or where ``indices`` names them. The part is ``size`` rows from row
    ``first`` of its stack and row ``start`` of the matrix; other rows of ``out`` are left alone."""
    dtype: tl.constexpr = out.dtype.element_ty
    UNIT: tl.constexpr = 64 if BITS == 6 else 128 // BITS
    UNIT_BYTES: tl.constexpr = 48 if BITS == 6 else 16
    ZEROS: tl.constexpr = SCALES == "plain" and g1 is not None
    SHIFTS: tl.constexpr = SCALES != "nested" and g2 is not None
    k_tiles = tl.cdiv(in_features, UNITS * UNIT)
    unit = tl.program_id(0) % k_tiles * UNITS + tl.arange(0, UNITS)[None, :, None]
    to = (tl.program_id(0) // k_tiles * BLOCK_N + tl.arange(0, BLOCK_N))[:, None, None]
    ok = to < num_rows
    in_part = to if indices is None else (tl.load(indices + to, mask=ok, other=-1) - start).to(tl.int32)
    ok = ok & (in_part >= 0) & (in_part < size)
    lanes = tl.arange(0, 16)[None, None, :]
    row = first + in_part
    at = codes + row.to(tl.int64) * row_bytes + unit * UNIT_BYTES + lanes
    even, odd, high = _codes(at, ok & (_first_columns(unit, BITS) < in_features), BITS)
    for piece in tl.static_range(8 // BITS if BITS != 6 else 4):
        columns = _first_columns(unit, BITS) + piece * (32 if BITS == 4 else 16) + lanes
        inside = ok & (columns < in_features)
        a, b, c, d = _grid_words(
            row, in_part, columns, inside, g0, g1, g2, g3, groups, in_features, GROUP, GROUP_ROWS, SCALES
        )
        scale, zero, shift = _scales_of(a, b, c, d, g1, g3, SCALES)
        code = _code(even, odd, high, piece, BITS)
        weights = _weights(code, scale, zero, shift, table, dtype, VALUES, ZERO, FACTOR, ZEROS, SHIFTS, ROUNDED)
        tl.store(out + to.to(tl.int64) * in_features + columns, weights, mask=inside)


KERNELS = KernelSet(_product, _joined, _rows, interpreted=not isinstance(_product, triton.JITFunction))


def quant() -> DeviceQuant:
    """The backend ``triton``."""
    return DeviceQuant("triton", QuantKernels(KERNELS), queue_for)


def available(device: torch.device) -> str | None:
    """Why this backend cannot run on the device; None when it can."""
    return unfit(device, interpreted=KERNELS.interpreted)
