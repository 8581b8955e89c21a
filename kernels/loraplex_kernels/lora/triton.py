"""The segmented low-rank product on a GPU: the kernels. Layouts, plans and launches are in the ``device_*`` files.

Two backends share their tiles. ``triton``: one launch shrinks (``h = x @ A.T``, K split into planes), one expands
(``y += h @ B.T``). ``triton-fused``: one launch does both, an expand item waiting for the shrink items it needs.

Every kernel loops over work items whose number it reads from the step's metadata, over a grid that is fixed when it is
launched: a captured launch holds only pointers that never move, and serves any set of adapters. No float atomics: each
element of h and of y is stored once, by one program, and sums have an order that depends on the table's shape and the
step's form alone, so a row's bits do not depend on its neighbours.

Why the fused launch cannot hang. Item i is done by program ``i % programs``, and every program does all its shrink
items, which wait for nothing, before its first expand item. All programs are resident at once (``Form.resident``), or
become so: what else the device runs ends without them, because fused launches follow each other on one stream. So
every shrink item is done at last, and every wait ends.

Why an expand item then sees h. A shrink program's stores of h, its barrier and the release of its count are ordered
for the whole device (release is cumulative over what a barrier made it observe); the count is read with acquire, and
the barrier behind that orders the other threads' loads. Counters are zero between launches: the last expand item to
have seen a pair's count complete resets it, so that a replay needs no launch that clears them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loraplex_kernels.lora import device_layout as layout
from loraplex_kernels.lora.device import DeviceLora
from loraplex_kernels.lora.device_launch import GridKernels, KernelSet
from loraplex_kernels.lora.uploads import queue_for

# A kernel reads globals only as constexpr.
COUNTS: tl.constexpr = tl.constexpr(layout.COUNT_WORDS)
TILE: tl.constexpr = tl.constexpr(layout.TILE_WORDS)
PAIR: tl.constexpr = tl.constexpr(layout.PAIR_WORDS)
COLUMN: tl.constexpr = tl.constexpr(layout.COLUMN_WORDS)
SLOT: tl.constexpr = tl.constexpr(layout.SLOT_WORDS)
PART: tl.constexpr = tl.constexpr(layout.PART_WORDS)


@triton.jit
def _slot_row(root, slot, PARTS: tl.constexpr):
    """The address of a slot's row, and whether the table has one: it may be shorter than another's."""
    rows = tl.load(root).to(tl.pointer_type(tl.int64))
    return rows + slot.to(tl.int64) * (SLOT + PARTS * PART), slot < tl.load(root + 1)


@triton.jit
def _lanes(num_pairs, programs, SPLITS: tl.constexpr, MAX_LANES: tl.constexpr):
    """How many programs share the rank tiles of one K split of one pair: as many as would be idle otherwise."""
    return tl.maximum(1, tl.minimum(MAX_LANES, programs // tl.maximum(1, num_pairs * SPLITS)))


@triton.jit
def _shrink_item(
    item, lanes, x, meta, root, header, x_stride, in_features, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """One K split of one pair's rows times every ``lanes``-th rank tile of the slot's stacked A, to one plane of h."""
    index = item // (SPLITS * lanes)
    split = item // lanes % SPLITS
    lane = item % lanes
    pair = meta + tl.load(meta + 2) + index * PAIR
    first_row = tl.load(pair)
    num_rows = tl.load(pair + 1)
    row, known = _slot_row(root, tl.load(pair + 2), PARTS)
    a = tl.multiple_of(tl.load(row, mask=known, other=0).to(tl.pointer_type(x.dtype.element_ty)), 16)
    num_ranks = tl.load(row + 1, mask=known, other=0).to(tl.int32)
    h_stride = tl.multiple_of(tl.load(header + 1).to(tl.int32), 16)
    h = tl.multiple_of(tl.load(header).to(tl.pointer_type(tl.float32)), 16)
    h += (split * tl.load(meta + 3) + tl.load(pair + 4)).to(tl.int64) * h_stride

    rows = tl.arange(0, BLOCK_M)
    row_ok = rows < num_rows
    x_rows = x + (first_row + rows).to(tl.int64)[:, None] * x_stride
    num_tiles = tl.cdiv(num_ranks, BLOCK_R)
    for tile in range(lane, num_tiles, lanes):
        ranks = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        rank_ok = ranks < num_ranks
        a_rows = a + ranks.to(tl.int64)[:, None] * in_features
        acc = tl.full([BLOCK_M, BLOCK_R], 0.0, tl.float32)
        for k in range(split * CHUNK, tl.minimum((split + 1) * CHUNK, in_features), BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            k_ok = ks < in_features
            x_tile = tl.load(x_rows + ks[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            a_tile = tl.load(a_rows + ks[None, :], mask=rank_ok[:, None] & k_ok[None, :], other=0.0)
            acc = tl.dot(x_tile, tl.trans(a_tile), acc, input_precision="ieee")
        tl.store(h + rows[:, None] * h_stride + ranks[None, :], acc, mask=row_ok[:, None] & rank_ok[None, :])
    if FUSED:  # noqa: SIM102 - decided when the kernel is compiled
        if lane < num_tiles:
            ready = tl.load(header + 2).to(tl.pointer_type(tl.int32)) + 2 * index
            tl.debug_barrier()
            tl.atomic_add(ready, 1, sem="release", scope="gpu")


@triton.jit
def _await(ready, expected, num_visits):
    """Wait until so many items have counted here; the last of all visitors to have seen that puts the counters back to
    0."""
    while tl.atomic_add(ready, 0, sem="acquire", scope="gpu") < expected:
        pass
    tl.debug_barrier()
    if tl.atomic_add(ready + 1, 1, sem="acq_rel", scope="gpu") == num_visits - 1:
        tl.store(ready, 0)
        tl.store(ready + 1, 0)


@triton.jit
def _await_pair(
    header, index, row, known, lanes, num_columns, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Wait until all of a pair's h is written."""
    ready = tl.load(header + 2).to(tl.pointer_type(tl.int32)) + 2 * index
    rank_tiles = tl.cdiv(tl.load(row + 1, mask=known, other=0).to(tl.int32), BLOCK_R)
    _await(ready, SPLITS * tl.minimum(lanes, rank_tiles), num_columns)


@triton.jit
def _h_tile(h, plane, ok, SPLITS: tl.constexpr):
    """The sum of all planes, in order. ``.cg``: other multiprocessors wrote h a moment ago."""
    total = tl.load(h, mask=ok, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(h + split * plane, mask=ok, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _is_touched(pairs, first_pair, num_pairs, root, part, PARTS: tl.constexpr):
    """Whether any term has factors, a scale or a shift at a part."""
    touched = tl.full([], 0, tl.int64)
    for index in range(first_pair, first_pair + num_pairs):
        row, known = _slot_row(root, tl.load(pairs + index * PAIR + 2), PARTS)
        touched |= (
            tl.load(row + part, mask=known, other=0)
            | tl.load(row + part + 3, mask=known, other=0)
            | tl.load(row + part + 4, mask=known, other=0)
        )
    return touched != 0


@triton.jit
def _expand_item(
    item, lanes, y, ids, meta, root, header, columns, num_columns, width, in_features, PARTS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    ALIGNED: tl.constexpr, AHEAD: tl.constexpr, LOOKUP: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """All terms of one row tile at one column tile of one part: y is read once and stored once, or left alone."""
    dtype = y.dtype.element_ty
    tile = meta + COUNTS + (item // num_columns) * TILE
    first_row = tl.load(tile)
    num_rows = tl.load(tile + 1)
    first_pair = tl.load(tile + 2)
    num_pairs = tl.load(tile + 3)
    column = columns + (item % num_columns) * COLUMN
    part = SLOT + tl.load(column) * PART
    first = tl.load(column + 1)
    y_first = tl.load(column + 2)
    size = tl.load(column + 3)
    if ALIGNED:
        first = tl.multiple_of(first, 16)
        y_first = tl.multiple_of(y_first, 16)
        size = tl.multiple_of(size, 16)
    pairs = meta + tl.load(meta + 2)

    if _is_touched(pairs, first_pair, num_pairs, root, part, PARTS):
        rows = tl.arange(0, BLOCK_M)
        row_ok = rows < num_rows
        ns = first + tl.arange(0, BLOCK_N)
        n_ok = ns < size
        y_at = y + first_row.to(tl.int64) * width + y_first + rows[:, None] * width + tl.arange(0, BLOCK_N)[None, :]
        y_ok = row_ok[:, None] & n_ok[None, :]
        if BLOCK_M == 16:  # asked for first, used last; a larger tile would be in the way of the sums
            y_tile = tl.load(y_at, mask=y_ok, other=0.0, cache_modifier=".cg")
        if LOOKUP:
            id_rows = tl.load(ids + first_row + rows, mask=row_ok, other=0)
            row_ok = row_ok & (id_rows >= 0) & (id_rows < in_features)
        h_stride = tl.multiple_of(tl.load(header + 1).to(tl.int32), 16)
        h = tl.multiple_of(tl.load(header).to(tl.pointer_type(tl.float32)), 16)
        plane = tl.load(meta + 3).to(tl.int64) * h_stride
        acc = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
        scales = tl.full([BLOCK_N], 1.0, tl.float32)
        shifts = tl.full([BLOCK_N], 0.0, tl.float32)
        for index in range(first_pair, first_pair + num_pairs):
            pair = pairs + index * PAIR
            weight = tl.load(pair + 3).to(tl.float32, bitcast=True)
            row, known = _slot_row(root, tl.load(pair + 2), PARTS)
            b = tl.load(row + part, mask=known, other=0).to(tl.pointer_type(dtype))
            b = tl.multiple_of(b, 16) + ns[None, :]
            first_rank = tl.load(row + part + 1, mask=known, other=0).to(tl.int32)
            num_ranks = tl.load(row + part + 2, mask=known, other=0).to(tl.int32)
            ranks = tl.arange(0, BLOCK_C)
            if AHEAD:  # each chunk of B is asked for before the wait for h, and before the one in front is multiplied
                b_ok = (ranks < num_ranks)[:, None] & n_ok[None, :]
                b_next = tl.load(b + ranks[:, None] * size, mask=b_ok, other=0.0)
            if FUSED:
                _await_pair(header, index, row, known, lanes, num_columns, SPLITS, BLOCK_R)
            # most slots have one chunk: copies pipelined through shared memory would only cost registers
            for rank in tl.range(0, num_ranks, BLOCK_C, num_stages=1):
                h_ok = row_ok[:, None] & (rank + ranks < num_ranks)[None, :]
                if LOOKUP:
                    a = tl.load(row, mask=known, other=0).to(tl.pointer_type(dtype))
                    a_at = (first_rank + rank + ranks).to(tl.int64)[None, :] * in_features + id_rows[:, None]
                    h_tile = tl.load(a + a_at, mask=h_ok, other=0.0).to(tl.float32)
                else:
                    h_at = h + tl.load(pair + 4).to(tl.int64) * h_stride + first_rank
                    h_tile = _h_tile(h_at + rows[:, None] * h_stride + (rank + ranks)[None, :], plane, h_ok, SPLITS)
                at = (rank + BLOCK_C * AHEAD + ranks)[:, None]
                b_tile = tl.load(b + at * size, mask=(at < num_ranks) & n_ok[None, :], other=0.0)
                if AHEAD:
                    b_tile, b_next = b_next, b_tile
                acc = tl.dot((weight * h_tile).to(dtype), b_tile, acc, input_precision="ieee")
            out_scale = tl.load(row + part + 3, mask=known, other=0)
            shift = tl.load(row + part + 4, mask=known, other=0)
            if out_scale != 0:
                vector = out_scale.to(tl.pointer_type(tl.float32))
                scales += weight * (tl.load(vector + ns, mask=n_ok, other=1.0) - 1.0)
            if shift != 0:
                shifts += weight * tl.load(shift.to(tl.pointer_type(tl.float32)) + ns, mask=n_ok, other=0.0)
        if BLOCK_M != 16:
            y_tile = tl.load(y_at, mask=y_ok, other=0.0, cache_modifier=".cg")
        total = y_tile.to(tl.float32) * scales[None, :] + acc + shifts[None, :]
        tl.store(y_at, total.to(dtype), mask=y_ok)
    elif FUSED:
        for index in range(first_pair, first_pair + num_pairs):
            row, known = _slot_row(root, tl.load(pairs + index * PAIR + 2), PARTS)
            _await_pair(header, index, row, known, lanes, num_columns, SPLITS, BLOCK_R)


@triton.jit
def _shrink(
    x, meta, root, header, x_stride, in_features, PARTS: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, MAX_LANES: tl.constexpr,
):  # fmt: skip
    num_pairs = tl.load(meta + 1)
    lanes = _lanes(num_pairs, tl.num_programs(0), SPLITS, MAX_LANES)
    for item in range(tl.program_id(0), num_pairs * SPLITS * lanes, tl.num_programs(0)):
        _shrink_item(
            item, lanes, x, meta, root, header, x_stride, in_features, PARTS, SPLITS, CHUNK, BLOCK_M, BLOCK_R, BLOCK_K,
            FUSED=False,
        )  # fmt: skip


@triton.jit
def _expand(
    y, ids, meta, root, header, columns, num_columns, width, in_features, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ALIGNED: tl.constexpr, AHEAD: tl.constexpr,
    LOOKUP: tl.constexpr,
):  # fmt: skip
    for item in range(tl.program_id(0), tl.load(meta) * num_columns, tl.num_programs(0)):
        _expand_item(
            item, 1, y, ids, meta, root, header, columns, num_columns, width, in_features, PARTS, SPLITS, BLOCK_M,
            BLOCK_N, BLOCK_C, 1, ALIGNED, AHEAD, LOOKUP, FUSED=False,
        )  # fmt: skip


@triton.jit
def _fused(
    y, x, meta, root, header, columns, num_columns, width, x_stride, in_features, PARTS: tl.constexpr,
    SPLITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, MAX_LANES: tl.constexpr, ALIGNED: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    num_pairs = tl.load(meta + 1)
    lanes = _lanes(num_pairs, tl.num_programs(0), SPLITS, MAX_LANES)
    for item in range(tl.program_id(0), num_pairs * SPLITS * lanes, tl.num_programs(0)):
        _shrink_item(
            item, lanes, x, meta, root, header, x_stride, in_features, PARTS, SPLITS, CHUNK, BLOCK_M, BLOCK_R, BLOCK_K,
            FUSED=True,
        )  # fmt: skip
    for item in range(tl.program_id(0), tl.load(meta) * num_columns, tl.num_programs(0)):
        _expand_item(
            item, lanes, y, meta, meta, root, header, columns, num_columns, width, in_features, PARTS, SPLITS, BLOCK_M,
            BLOCK_N, BLOCK_C, BLOCK_R, ALIGNED, AHEAD, LOOKUP=False, FUSED=True,
        )  # fmt: skip


@triton.jit
def _scale(
    out, x, meta, root, x_stride, in_features, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x' for every row of the step: rows of no segment are gaps in the metadata, and copied."""
    num_columns = tl.cdiv(in_features, BLOCK_N)
    for item in range(tl.program_id(0), tl.load(meta + 4) * num_columns, tl.num_programs(0)):
        tile = meta + COUNTS + (item // num_columns) * TILE
        first_pair = tl.load(tile + 2)
        pairs = meta + tl.load(meta + 2)
        ks = (item % num_columns) * BLOCK_N + tl.arange(0, BLOCK_N)
        k_ok = ks < in_features
        rows = tl.arange(0, BLOCK_M)
        ok = (rows < tl.load(tile + 1))[:, None] & k_ok[None, :]
        at = (tl.load(tile) + rows).to(tl.int64)[:, None]
        x_tile = tl.load(x + at * x_stride + ks[None, :], mask=ok, other=0.0)
        factor = tl.full([BLOCK_N], 1.0, tl.float32)
        for index in range(first_pair, first_pair + tl.load(tile + 3)):
            pair = pairs + index * PAIR
            row, known = _slot_row(root, tl.load(pair + 2), PARTS)
            weight = tl.load(pair + 3).to(tl.float32, bitcast=True)
            in_scale = tl.load(row + 2, mask=known, other=0)
            if in_scale != 0:
                factor += weight * (tl.load(in_scale.to(tl.pointer_type(tl.float32)) + ks, mask=k_ok, other=1.0) - 1.0)
        scaled = x_tile.to(tl.float32) * factor[None, :]
        tl.store(out + at * in_features + ks[None, :], scaled.to(x.dtype.element_ty), mask=ok)


KERNELS = KernelSet(_shrink, _expand, _fused, _scale, interpreted=not isinstance(_fused, triton.JITFunction))


def lora(*, fused: bool) -> DeviceLora:
    """The backend ``triton`` or ``triton-fused``."""
    return DeviceLora("triton-fused" if fused else "triton", GridKernels(KERNELS, fused=fused), queue_for)


def available(device: torch.device) -> str | None:
    """Why these backends cannot run on the device; None when they can."""
    return unfit(device, interpreted=KERNELS.interpreted)


def unfit(device: torch.device, *, interpreted: bool) -> str | None:
    """Why kernels, compiled or interpreted, cannot run on the device; None when they can."""
    if device.type == "cuda":
        return "Triton is in interpreter mode (TRITON_INTERPRET), which runs on cpu tensors" if interpreted else None
    if device.type == "cpu" and interpreted:
        return None
    return f"it runs on cuda, and on cpu only in Triton's interpreter (TRITON_INTERPRET=1); the device is {device}"
