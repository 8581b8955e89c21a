"""Paged causal attention in Triton: decodes and prefill chunks of many sequences, one kernel for both.

One program attends one item: a tile of query rows of one sequence, under one kv head, over one split of its context.
The rows are the queries of the tile times the query heads of the group, so K and V are read once for a group. Softmax
is online, in float32. An item that is the only split of its rows stores out; others store a normalized partial result
and its log-sum-exp, which a second kernel joins in the order of the splits. Nothing is added atomically.

A decode's new key and value never travel through memory first: the program of its last split starts its softmax with
them and stores them into their page. The rows of chunks are written by a kernel of their own, because several
programs read them.

Loads are masked by position, so what a page holds past its sequence's context never reaches a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from loraplex_kernels.attention import (
    AttentionPlan,
    KVCache,
    SequenceSpan,
    StaticAttentionPlan,
    paged_cache,
    paged_plan,
)
from loraplex_kernels.attention.paged_cache import CacheShape, PagedCache, check_inputs, check_scale
from loraplex_kernels.attention.paged_plan import DeviceSpans, PagedPlan, StaticPagedPlan, span_table
from loraplex_kernels.attention.tiles import Tiles, power_of_two, tiles_for

DECODE_ITEMS = tl.constexpr(paged_plan.DECODE_ITEMS)
DECODE_COUNTS = tl.constexpr(paged_plan.DECODE_COUNTS)
MAX_AGE = tl.constexpr(paged_plan.MAX_AGE)
CHUNK_ITEMS = tl.constexpr(paged_plan.CHUNK_ITEMS)
CHUNK_COUNT = tl.constexpr(paged_plan.CHUNK_COUNT)
COMBINE_ROWS = tl.constexpr(paged_plan.COMBINE_ROWS)
COMBINE_COUNT = tl.constexpr(paged_plan.COMBINE_COUNT)
HEADER = tl.constexpr(paged_plan.HEADER)
CONTEXT = tl.constexpr(paged_plan.CONTEXT)
FIRST_ROW = tl.constexpr(paged_plan.FIRST_ROW)
QUERIES = tl.constexpr(paged_plan.QUERIES)
SPLIT = tl.constexpr(paged_plan.SPLIT)
PARTIAL = tl.constexpr(paged_plan.PARTIAL)
PAGES = tl.constexpr(paged_plan.PAGES)
RECORD = tl.constexpr(paged_plan.RECORD)
ITEM = tl.constexpr(paged_plan.ITEM)
COMBINE = tl.constexpr(paged_plan.COMBINE)
SPLIT_KEYS = tl.constexpr(paged_plan.SPLIT_KEYS)
MAX_SPLITS = tl.constexpr(paged_plan.MAX_SPLITS)

LOG2_E = 1.4426950408889634
#: window of a layer without one: more than any context
NO_WINDOW = 1 << 30
# Splits that a program of the combining kernel has under way at once.
COMBINE_SPLITS = 16


@triton.jit(do_not_specialize=["num_rows"])
def _write_kernel(
    k, v, keys, values, slots, num_rows,
    stride_k_row, stride_k_head, stride_v_row, stride_v_head, stride_page, stride_head, stride_slot,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """k, v rows -> the pages; one program for ROWS rows and COLUMNS of their kv_heads * head_dim values."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(slots + row, mask=row < num_rows, other=-1).to(tl.int64)
    mask = (slot >= 0)[:, None] & (column < KV_HEADS * HEAD_DIM)[None, :]
    head, dim = column // HEAD_DIM, column % HEAD_DIM
    target = (slot // PAGE * stride_page + slot % PAGE * stride_slot)[:, None] + (head * stride_head + dim)[None, :]
    new_keys = tl.load(k + (row * stride_k_row)[:, None] + (head * stride_k_head + dim)[None, :], mask=mask)
    tl.store(keys + target, new_keys, mask=mask)
    new_values = tl.load(v + (row * stride_v_row)[:, None] + (head * stride_v_head + dim)[None, :], mask=mask)
    tl.store(values + target, new_values, mask=mask)


@triton.jit
def _seen(record, first_query, tile_queries, window):
    """The keys ``low .. high-1`` that a tile of queries sees at all, and the splits they lie in, first and last."""
    context = tl.load(record + CONTEXT)
    split_keys = tl.load(record + SPLIT)
    before = context - tl.load(record + QUERIES) + first_query
    high = tl.minimum(before + tile_queries, context)
    low = tl.maximum(before + 1 - window, 0)
    return low, high, low // split_keys, tl.maximum(high - 1, 0) // split_keys


@triton.jit
def _newest(
    queries, k, v, keys, values, target, scale, newest,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Where a decode's softmax starts: at its new key, which goes into its page, if ``newest``; else at nothing."""
    dims = tl.arange(0, DIM)
    mask = (dims < HEAD_DIM) & newest
    key = tl.load(k + dims, mask=mask, other=0.0)
    value = tl.load(v + dims, mask=mask, other=0.0)
    tl.store(keys + target + dims, key, mask=mask)
    tl.store(values + target + dims, value, mask=mask)
    score = tl.sum(queries.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale
    top = tl.where(newest, score, float("-inf"))
    total = tl.zeros([ROWS], tl.float32) + tl.where(newest, 1.0, 0.0)
    return top, total, tl.zeros([ROWS, DIM], tl.float32) + value.to(tl.float32)[None, :]


@triton.jit
def _walk(
    queries, position, top, total, acc, keys, values, page_list, begin, end,
    stride_page, stride_slot, scale, window,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, DECODE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Online softmax of the rows ``queries``, at ``position``, over the keys ``begin .. end-1`` of one kv head."""
    dims = tl.arange(0, DIM)
    for start in tl.range(begin // KEYS * KEYS, end, KEYS):
        at = start + tl.arange(0, KEYS)
        there = (at >= begin) & (at < end)
        page = tl.load(page_list + at // PAGE, mask=there, other=0).to(tl.int64)
        place = (page * stride_page + at % PAGE * stride_slot)[:, None] + dims[None, :]
        mask = there[:, None] & (dims < HEAD_DIM)[None, :]
        key = tl.load(keys + place, mask=mask, other=0.0)
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
        if DECODE:
            seen = there[None, :]
        else:
            seen = there[None, :] & (at[None, :] <= position[:, None]) & (at[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        value = tl.load(values + place, mask=mask, other=0.0)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, total, acc


@triton.jit
def _attend_item(
    q, k, v, keys, values, out, partials, sums, meta, item, kv_head,
    stride_q_row, stride_q_head, stride_k_row, stride_v_row, stride_page, stride_slot, scale, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    DECODE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One item; k, v, keys and values begin at its kv head."""
    record = meta + HEADER + tl.load(item) * RECORD
    first_query = tl.load(item + 1) * TILE
    split = tl.load(item + 2)
    low, high, first_split, last_split = _seen(record, first_query, TILE, window)
    if (split >= first_split) & (split <= last_split):
        rows = tl.arange(0, ROWS)
        query = first_query + rows // GROUP
        head = kv_head * GROUP + rows % GROUP
        live = (rows < TILE * GROUP) & (query < tl.load(record + QUERIES))
        dims = tl.arange(0, DIM)
        first_row = tl.load(record + FIRST_ROW).to(tl.int64)
        row = first_row + query
        block = live[:, None] & (dims < HEAD_DIM)[None, :]
        queries = tl.load(
            q + (row * stride_q_row + head * stride_q_head)[:, None] + dims[None, :], mask=block, other=0.0
        )
        page_list = meta + tl.load(record + PAGES)
        split_keys = tl.load(record + SPLIT)
        begin = tl.maximum(low, split * split_keys)
        end = tl.minimum(high, (split + 1) * split_keys)
        if DECODE:
            newest = (split == last_split) & (high > 0)
            end = tl.minimum(end, high - 1)
            page = tl.load(page_list + (high - 1) // PAGE, mask=newest, other=0).to(tl.int64)
            target = page * stride_page + (high - 1) % PAGE * stride_slot
            top, total, acc = _newest(
                queries, k + first_row * stride_k_row, v + first_row * stride_v_row, keys, values, target,
                scale, newest, HEAD_DIM, DIM, ROWS,
            )  # fmt: skip
        else:
            top = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, DIM], tl.float32)
        position = tl.load(record + CONTEXT) - tl.load(record + QUERIES) + query
        top, total, acc = _walk(
            queries, position, top, total, acc, keys, values, page_list, begin, end,
            stride_page, stride_slot, scale, window, HEAD_DIM, DIM, PAGE, DECODE, KEYS,
        )  # fmt: skip
        if first_split == last_split:
            divisor = tl.where(live & (high > 0), total, 1.0)  # a padded row's sum is 0
            place = (row * (KV_HEADS * GROUP) + head) * HEAD_DIM
            tl.store(out + place[:, None] + dims[None, :], (acc / divisor[:, None]).to(q.dtype.element_ty), mask=block)
        else:
            splits = tl.cdiv(tl.load(record + CONTEXT), split_keys)
            pair = (
                (tl.load(record + PARTIAL).to(tl.int64) + query * splits) * (KV_HEADS * GROUP) + head * splits + split
            )
            divisor = tl.where(total == 0.0, 1.0, total)  # a row of the tile that sees nothing of this split
            tl.store(partials + (pair * HEAD_DIM)[:, None] + dims[None, :], acc / divisor[:, None], mask=block)
            tl.store(sums + pair, top + tl.log2(divisor), mask=live)


@triton.jit(do_not_specialize=["window"])
def _attend_kernel(
    q, k, v, keys, values, out, partials, sums, meta,
    stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head,
    stride_page, stride_head, stride_slot, scale, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    DECODE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """All items of the decodes, or of the chunks: TILE queries of GROUP heads in ROWS rows, KEYS keys at a time."""
    if DECODE:
        age = tl.minimum((window - 1) // SPLIT_KEYS + 1, tl.load(meta + MAX_AGE))
        count = tl.load(meta + tl.load(meta + DECODE_COUNTS) + age)
        items = meta + tl.load(meta + DECODE_ITEMS)
    else:
        count = tl.load(meta + CHUNK_COUNT)
        items = meta + tl.load(meta + CHUNK_ITEMS)
    for work in tl.range(tl.program_id(0), count * KV_HEADS, tl.num_programs(0)):
        kv_head = work % KV_HEADS
        _attend_item(
            q, k + kv_head * stride_k_head, v + kv_head * stride_v_head,
            keys + kv_head * stride_head, values + kv_head * stride_head,
            out, partials, sums, meta, items + work // KV_HEADS * ITEM, kv_head,
            stride_q_row, stride_q_head, stride_k_row, stride_v_row, stride_page, stride_slot, scale, window,
            KV_HEADS, GROUP, HEAD_DIM, DIM, PAGE, DECODE, TILE, ROWS, KEYS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["window"])
def _combine_kernel(
    partials, sums, out, meta, window,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Rows of several splits: their partial results weighted by their sums, SPLITS at a time, in order."""
    rows = meta + tl.load(meta + COMBINE_ROWS)
    for work in tl.range(tl.program_id(0), tl.load(meta + COMBINE_COUNT) * HEADS, tl.num_programs(0)):
        head = work % HEADS
        record = meta + HEADER + tl.load(rows + work // HEADS * COMBINE) * RECORD
        query = tl.load(rows + work // HEADS * COMBINE + 1)
        _, _, first, last = _seen(record, query // TILE * TILE, TILE, window)
        if first < last:
            splits = tl.cdiv(tl.load(record + CONTEXT), tl.load(record + SPLIT))
            pair = (tl.load(record + PARTIAL).to(tl.int64) + query * splits) * HEADS + head * splits
            every = tl.arange(0, MAX_SPLITS)
            mask = (every >= first) & (every <= last)
            top = tl.max(tl.load(sums + pair + every, mask=mask, other=float("-inf")), 0)
            dims = tl.arange(0, DIM)
            acc = tl.zeros([DIM], tl.float32)
            total = 0.0
            for start in tl.range(first // SPLITS * SPLITS, last + 1, SPLITS):
                split = start + tl.arange(0, SPLITS)
                there = (split >= first) & (split <= last)
                weights = tl.exp2(tl.load(sums + pair + split, mask=there, other=float("-inf")) - top)
                block = there[:, None] & (dims < HEAD_DIM)[None, :]
                place = ((pair + split) * HEAD_DIM)[:, None] + dims[None, :]
                acc += tl.sum(weights[:, None] * tl.load(partials + place, mask=block, other=0.0), 0)
                total += tl.sum(weights, 0)
            row = tl.load(record + FIRST_ROW).to(tl.int64) + query
            target = out + (row * HEADS + head) * HEAD_DIM + dims
            tl.store(target, (acc / total).to(out.dtype.element_ty), mask=dims < HEAD_DIM)


def unfit(device: torch.device) -> str | None:
    """Why these kernels cannot run on ``device``; None when they can."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    interpreted = not isinstance(_attend_kernel, triton.JITFunction)
    if device.type == "cuda" and interpreted:
        return "triton was imported with TRITON_INTERPRET set, which is for machines without a GPU"
    if device.type != "cuda" and not interpreted:
        return f"it compiles for CUDA, the device is {device} (TRITON_INTERPRET=1 runs it there, to test it)"
    return None


class TritonAttention:
    """The backend for CUDA tensors, and for CPU tensors in Triton's interpreter."""

    name = "triton"

    def new_cache(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        shape = CacheShape(num_layers, num_pages, page_size, kv_heads, head_dim)
        return PagedCache(shape, dtype, device, heads_first=True)

    def prepare(self, spans: Sequence[SequenceSpan], cache: KVCache) -> AttentionPlan:
        assert isinstance(cache, PagedCache), "a cache of another backend"
        table = span_table(spans, num_pages=cache.num_pages, page_size=cache.page_size)
        return PagedPlan(table, page_size=cache.page_size, device=cache.device)

    def static_plan(self, cache: KVCache, max_sequences: int, max_pages: int) -> StaticAttentionPlan | None:
        assert isinstance(cache, PagedCache), "a cache of another backend"
        return StaticPagedPlan(max_sequences, max_pages, cache.num_pages, cache.page_size, cache.device)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        layer: int,
        cache: KVCache,
        plan: AttentionPlan,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        assert isinstance(cache, PagedCache), "a cache of another backend"
        assert isinstance(plan, PagedPlan | StaticPagedPlan), "a plan of another backend"
        check_inputs(q, k, v, cache, plan.num_tokens)
        check_scale(scale, window)
        heads = q.shape[1]
        out = torch.empty((plan.num_tokens, heads * cache.head_dim), dtype=q.dtype, device=q.device)
        if not plan.num_tokens:
            return out
        tiles = tiles_for(cache.head_dim, heads // cache.kv_heads, q.dtype)
        spans = plan.on_device(tiles.chunk.queries)
        if spans.slots.numel():
            write(k, v, cache=cache, layer=layer, slots=spans.slots)
        _launch(q, k, v, out, Launch(cache, layer, scale * LOG2_E, window or NO_WINDOW, tiles, spans))
        return out

    @staticmethod
    def page_bytes(*, num_layers: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return paged_cache.page_bytes(
            num_layers=num_layers, page_size=page_size, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
        )


def write(k: torch.Tensor, v: torch.Tensor, *, cache: PagedCache, layer: int, slots: torch.Tensor) -> None:
    """Rows of k and v into ``layer``'s pages at ``slots`` (page * page_size + slot); a row of slot -1 nowhere."""
    keys, values = cache.keys[layer], cache.values[layer]
    columns = cache.kv_heads * cache.head_dim
    width = min(1024, power_of_two(columns))
    grid = (triton.cdiv(slots.numel(), 4), triton.cdiv(columns, width))
    _write_kernel[grid](
        k, v, keys, values, slots, slots.numel(),
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), keys.stride(0), keys.stride(1), keys.stride(2),
        KV_HEADS=cache.kv_heads, HEAD_DIM=cache.head_dim, PAGE=cache.page_size, ROWS=4, COLUMNS=width,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Launch:
    """What the kernels of one layer are launched with besides q, k, v and out."""

    cache: PagedCache
    layer: int
    scale: float  # for powers of two
    window: int
    tiles: Tiles
    spans: DeviceSpans


def _launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, launch: Launch) -> None:
    cache, tiles, spans = launch.cache, launch.tiles, launch.spans
    keys, values, counts = cache.keys[launch.layer], cache.values[launch.layer], spans.counts
    heads = q.shape[1]
    partials = torch.empty((counts.partials * heads, cache.head_dim), dtype=torch.float32, device=q.device)
    sums = torch.empty(counts.partials * heads, dtype=torch.float32, device=q.device)
    for decode, items, tile in ((True, counts.decode_items, tiles.decode), (False, counts.chunk_items, tiles.chunk)):
        if items:
            _attend_kernel[(min(items * cache.kv_heads, spans.max_programs),)](
                q, k, v, keys, values, out, partials, sums, spans.meta,
                q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
                keys.stride(0), keys.stride(1), keys.stride(2), launch.scale, launch.window,
                KV_HEADS=cache.kv_heads, GROUP=heads // cache.kv_heads, HEAD_DIM=cache.head_dim, DIM=tiles.dim,
                PAGE=cache.page_size, DECODE=decode, TILE=tile.queries, ROWS=tile.rows, KEYS=tile.keys,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    if counts.combine_rows:
        _combine_kernel[(min(counts.combine_rows * heads, spans.max_programs),)](
            partials, sums, out, spans.meta, launch.window,
            HEADS=heads, HEAD_DIM=cache.head_dim, DIM=tiles.dim, TILE=tiles.chunk.queries, SPLITS=COMBINE_SPLITS,
            num_warps=4,
        )  # fmt: skip
