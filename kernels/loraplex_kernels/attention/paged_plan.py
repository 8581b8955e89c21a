"""A step's spans as one array of int32 for the Triton kernels; knows nothing of a cache's contents.

The array is a header, one record a sequence, then lists of what there is to do. All counts and offsets are in the
array, so a kernel reads everything that changes from one step to the next out of device memory, and a captured launch
serves any later step. A sequence's context is attended in splits of a fixed number of keys, which follows from the
sequence alone: what a row computes does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from loraplex_kernels.attention import SequenceSpan
from loraplex_kernels.attention.spans import check_spans

# Where the header keeps what (index of an int32). Offsets count from the start of the array.
DECODE_ITEMS = 0  # offset of the decode items
DECODE_COUNTS = 1  # offset of the counts: how many decode items are at most so many splits from their context's end
MAX_AGE = 2  # the last of those counts
CHUNK_ITEMS = 3
CHUNK_COUNT = 4
COMBINE_ROWS = 5
COMBINE_COUNT = 6
HEADER = 8

# A record of a sequence.
CONTEXT = 0  # 0 for a padded row
FIRST_ROW = 1
QUERIES = 2
SPLIT = 3  # keys of a split
PARTIAL = 4  # first of its (row, split) pairs in the scratch memory
PAGES = 5  # offset of its page list
RECORD = 8

ITEM = 3  # (sequence, query tile, split)
COMBINE = 2  # (sequence, query)

# Keys of a split. With 8 kv heads a context of 4,096 is 128 programs, about one for each multiprocessor of a large
# card, and the partial results written are 1 to 2 % of the bytes of K and V read (groups of 4, 2-byte values).
SPLIT_KEYS = 256
# (query, split) pairs of a sequence: bounds the scratch memory, and with it the splits of a chunk of many queries,
# which fill the card with their query tiles.
MAX_SPLITS = 128
MAX_CHUNK_PAIRS = 256
# Scratch rows of a captured plan: 8,192 rows of 32 heads of 128 are 136 MB, 2 million tokens of decodes.
MAX_STATIC_PARTIALS = 8192
# Programs of a captured launch for each multiprocessor: several times what fits beside each other, so that the card
# hands them out as it gets free, few enough that those without an item cost little.
PROGRAMS_EACH = 16
MAX_GRID = 2**31 - 1
# Sections begin at multiples of 16 bytes.
ALIGNED = 4

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SpanTable:
    """Checked spans as arrays."""

    contexts: IntArray
    queries: IntArray
    num_pages: IntArray
    pages: IntArray  # all page lists, one after the other


@dataclass(frozen=True, slots=True)
class Counts:
    """What a launch has to be large enough for."""

    decode_items: int
    chunk_items: int
    combine_rows: int
    partials: int


@dataclass(frozen=True, slots=True)
class PackedSpans:
    """The array, and where the write slots of all rows are in it (-1: the row is a decode, which writes itself)."""

    array: IntArray
    counts: Counts
    slots: slice


@dataclass(frozen=True, slots=True)
class DeviceSpans:
    """A step's spans on the device."""

    meta: torch.Tensor  # int32
    counts: Counts
    slots: torch.Tensor  # [T] int32; empty when no row is a chunk's
    max_programs: int  # what a launch is cut to, each program then taking several items


def span_table(spans: Sequence[SequenceSpan], *, num_pages: int, page_size: int) -> SpanTable:
    """``spans`` as arrays. Raises ValueError as ``check_spans`` does."""
    contexts: IntArray = np.array([span.context_len for span in spans], dtype=np.int32)
    queries: IntArray = np.array([span.num_queries for span in spans], dtype=np.int32)
    used = [span.pages[: -(-span.context_len // page_size)] for span in spans]
    lengths: IntArray = np.array([len(pages) for pages in used], dtype=np.int32)
    pages: IntArray = np.fromiter(chain.from_iterable(used), np.int32, count=int(lengths.sum()))
    held = (queries >= 1) & (queries <= contexts) & (lengths.astype(np.int64) * page_size >= contexts)
    if not held.all() or (pages.size and not 1 <= pages.min() <= pages.max() < num_pages):
        check_spans(spans, num_pages=num_pages, page_size=page_size)
    return SpanTable(contexts, queries, lengths, pages)


def split_keys(contexts: IntArray, queries: IntArray) -> IntArray:
    """Keys of a split for each sequence: SPLIT_KEYS, or the multiple of it that keeps its splits within bounds."""
    allowed = np.clip(MAX_CHUNK_PAIRS // queries, 1, MAX_SPLITS)
    units = -(-contexts // SPLIT_KEYS)
    keys: IntArray = (np.maximum(-(-units // allowed), 1) * SPLIT_KEYS).astype(np.int32)
    return keys


def padded_table(table: SpanTable, size: int) -> SpanTable:
    """``table`` with sequences of no context behind its own, up to ``size`` of them."""
    missing = size - table.contexts.size
    zeros = np.zeros(missing, dtype=np.int32)
    return SpanTable(
        np.concatenate([table.contexts, zeros]),
        np.concatenate([table.queries, zeros + 1]),
        np.concatenate([table.num_pages, zeros]),
        table.pages,
    )


def pack(table: SpanTable, *, page_size: int, tile_queries: int) -> PackedSpans:
    """``table`` as the array the kernels read, with chunks cut into tiles of ``tile_queries`` queries."""
    contexts, queries = table.contexts, table.queries
    keys = split_keys(contexts, queries)
    splits = np.maximum(-(-contexts // keys), 1)
    decodes, chunks = np.flatnonzero(queries == 1), np.flatnonzero(queries > 1)
    pairs = np.where(splits > 1, splits * queries, 0)
    decode_items, counts = _decode_items(decodes, splits)
    chunk_items = _chunk_items(chunks, table, keys, tile_queries)
    several = np.flatnonzero(splits > 1)
    combine = np.stack([np.repeat(several, queries[several]), _ranges(queries[several])], axis=1)
    slots = np.empty(0, dtype=np.int32)
    if chunks.size:
        slots = np.where(np.repeat(queries, queries) == 1, np.int32(-1), row_slots(table, page_size))

    records = np.zeros((contexts.size, RECORD), dtype=np.int32)
    array, offsets = joined([np.zeros(HEADER), records, counts, decode_items, chunk_items, combine, slots, table.pages])
    records[:, CONTEXT], records[:, QUERIES], records[:, SPLIT] = contexts, queries, keys
    records[:, FIRST_ROW] = np.cumsum(queries) - queries
    records[:, PARTIAL] = np.cumsum(pairs) - pairs
    records[:, PAGES] = offsets[7] + np.cumsum(table.num_pages) - table.num_pages
    array[HEADER : HEADER + records.size] = records.ravel()
    array[[DECODE_COUNTS, DECODE_ITEMS, CHUNK_ITEMS, COMBINE_ROWS]] = offsets[2:6]
    array[MAX_AGE], array[CHUNK_COUNT], array[COMBINE_COUNT] = counts.size - 1, len(chunk_items), len(combine)
    sizes = Counts(len(decode_items), len(chunk_items), len(combine), int(pairs.sum()))
    return PackedSpans(array, sizes, slice(offsets[6], offsets[6] + slots.size))


def _decode_items(decodes: npt.NDArray[np.intp], splits: IntArray) -> tuple[IntArray, IntArray]:
    """Items of all decodes, the splits nearest to their context's end first, and how many have at most which age.

    A layer with a window stops early in that list: one list serves layers with and without.
    """
    each = splits[decodes]
    sequence, split = np.repeat(decodes, each), _ranges(each)
    age = np.repeat(each, each) - 1 - split
    order = np.argsort(age, kind="stable")
    items = np.stack([sequence, np.zeros_like(sequence), split], axis=1)[order]
    counts = np.cumsum(np.bincount(age, minlength=1))
    return items.astype(np.int32), counts.astype(np.int32)


def _chunk_items(chunks: npt.NDArray[np.intp], table: SpanTable, keys: IntArray, tile_queries: int) -> IntArray:
    """Items of all chunks, the tiles with the longest contexts first, so that none starts last."""
    tiles = -(-table.queries[chunks] // tile_queries)
    sequence, tile = np.repeat(chunks, tiles), _ranges(tiles)
    last_query = np.minimum((tile + 1) * tile_queries, table.queries[sequence])
    end = table.contexts[sequence] - table.queries[sequence] + last_query
    splits = -(-end // keys[sequence])
    items = np.stack([np.repeat(sequence, splits), np.repeat(tile, splits), _ranges(splits)], axis=1)
    order = np.argsort(-np.repeat(np.minimum(end, keys[sequence]), splits), kind="stable")
    result: IntArray = items[order].astype(np.int32)
    return result


def row_slots(table: SpanTable, page_size: int) -> IntArray:
    """Where each row's key goes, page * page_size + slot; -1 for padded rows."""
    row_of = np.repeat(np.arange(table.queries.size), table.queries)
    position = (table.contexts - table.queries)[row_of] + _ranges(table.queries)
    slots: IntArray = np.full(row_of.size, -1, dtype=np.int32)
    live = np.flatnonzero(table.contexts[row_of])
    first_page = (np.cumsum(table.num_pages) - table.num_pages)[row_of[live]]
    at = position[live]
    slots[live] = table.pages[first_page + at // page_size] * page_size + at % page_size
    return slots


def _ranges(counts: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """``0 .. counts[0]-1, 0 .. counts[1]-1, ...``"""
    stops = np.cumsum(counts)
    total = int(stops[-1]) if counts.size else 0
    return np.arange(total) - np.repeat(stops - counts, counts)


def joined(sections: Sequence[npt.NDArray[np.generic]]) -> tuple[IntArray, list[int]]:
    """All sections in one array, each aligned, and where each begins."""
    offsets, end = [], 0
    for section in sections:
        offsets.append(end)
        end += -(-section.size // ALIGNED) * ALIGNED
    array: IntArray = np.zeros(end, dtype=np.int32)
    for offset, section in zip(offsets, sections, strict=True):
        array[offset : offset + section.size] = section.ravel()
    return array, offsets


def host_array(array: IntArray, device: torch.device) -> torch.Tensor:
    """``array`` in memory that the device can copy from while the host goes on.

    torch's allocator of pinned memory hands a block out again only after the copies from it are over, and takes a new
    one rather than wait.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _resident_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return PROGRAMS_EACH  # the interpreter runs one after the other
    return PROGRAMS_EACH * torch.cuda.get_device_properties(device).multi_processor_count


class PagedPlan:
    """One step's spans. They go to the device at the first layer, which says how many queries a tile takes."""

    def __init__(self, table: SpanTable, *, page_size: int, device: torch.device) -> None:
        self.num_tokens = int(table.queries.sum())
        self._table = table
        self._page_size = page_size
        self._device = device
        self._packed: dict[int, DeviceSpans] = {}

    def on_device(self, tile_queries: int) -> DeviceSpans:
        spans = self._packed.get(tile_queries)
        if spans is None:
            packed = pack(self._table, page_size=self._page_size, tile_queries=tile_queries)
            meta = host_array(packed.array, self._device).to(self._device, non_blocking=True)
            spans = self._packed[tile_queries] = DeviceSpans(meta, packed.counts, meta[packed.slots], MAX_GRID)
        return spans


class StaticPagedPlan:
    """Decodes in device memory that never moves. Fresh, all rows are padding."""

    def __init__(self, max_sequences: int, max_pages: int, cache_pages: int, page_size: int, device: torch.device):
        self.num_tokens = max_sequences
        self._max_pages, self._cache_pages, self._page_size = max_pages, cache_pages, page_size
        most = min(-(-max_pages * page_size // SPLIT_KEYS), MAX_SPLITS)  # splits of one sequence
        items = max_sequences * most
        partials = 0 if most == 1 else min(items, max(most, MAX_STATIC_PARTIALS))
        counts = Counts(items, 0, max_sequences if partials else 0, partials)
        sections = (HEADER, max_sequences * RECORD, most, items * ITEM, counts.combine_rows * COMBINE)
        size = sum(sections) + max_sequences * max_pages + ALIGNED * len(sections)
        self._meta = torch.zeros(size, dtype=torch.int32, device=device)
        self._spans = DeviceSpans(self._meta, counts, self._meta[:0], _resident_programs(device))
        self.set(())

    def on_device(self, tile_queries: int) -> DeviceSpans:
        del tile_queries  # decodes have one query each
        return self._spans

    def set(self, spans: Sequence[SequenceSpan]) -> bool:
        table = span_table(spans, num_pages=self._cache_pages, page_size=self._page_size)
        if len(spans) > self.num_tokens or (table.queries != 1).any() or (table.num_pages > self._max_pages).any():
            return False
        packed = pack(padded_table(table, self.num_tokens), page_size=self._page_size, tile_queries=1)
        if packed.counts.partials > self._spans.counts.partials:
            return False
        host = host_array(packed.array, self._meta.device)
        self._meta[: host.numel()].copy_(host, non_blocking=True)
        return True
