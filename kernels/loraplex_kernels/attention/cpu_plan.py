"""A step's spans as index tensors for the CPU backend; knows the cache's row order and nothing of its contents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loraplex_kernels.attention import SequenceSpan

# Slots of padding worth one more group of decodes: a group costs about 60 us of calls, a padded slot about 0.05 us.
MAX_PADDED_SLOTS = 1024

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DecodeRead:
    """Decodes of about equal context, gathered together.

    Scores are hidden by bits, ``(score & keep) | fill``: exact for any score, and six times as fast as a boolean mask.
    """

    rows: torch.Tensor  # [B] int64, rows of q
    gather: torch.Tensor  # [B * kv_heads * num_pages] int64, rows of the cache
    keep: torch.Tensor  # [B, 1, num_pages * page_size] integers of the dtype's item size: all bits of what is seen
    fill: torch.Tensor  # likewise: the bits of -inf of what is not
    num_pages: int


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """One sequence with several query rows, ``start:stop`` of q."""

    start: int
    stop: int
    gather: torch.Tensor | None  # [kv_heads * num_pages] int64; None when the step itself holds the whole context
    hidden: torch.Tensor  # [n, L] bool, keys the query must not see
    offset: int  # key column of query row 0
    window: int | None

    def keys_of(self, start: int, stop: int) -> tuple[int, int]:
        """The key columns that query rows ``start:stop`` can see at all."""
        first = 0 if self.window is None else max(0, self.offset + start + 1 - self.window)
        return first, self.offset + stop


@dataclass(frozen=True, slots=True)
class Reads:
    """What a layer with one window reads."""

    decodes: tuple[DecodeRead, ...]
    chunks: tuple[ChunkRead, ...]


class CpuAttentionPlan:
    """Index tensors of one step. Reads are made at the first layer that asks for a window and kept for the rest."""

    def __init__(self, spans: tuple[SequenceSpan, ...], *, page_size: int, kv_heads: int, dtype: torch.dtype) -> None:
        self._bits = torch.int32 if dtype.itemsize == 4 else torch.int16
        self._minus_inf = int(torch.tensor(float("-inf"), dtype=dtype).view(self._bits))
        self._page_size = page_size
        self._kv_heads = kv_heads
        self._pages = [np.asarray(span.pages, dtype=np.int64) for span in spans]
        self._contexts: IntArray = np.array([span.context_len for span in spans], dtype=np.int64)
        queries: IntArray = np.array([span.num_queries for span in spans], dtype=np.int64)
        self._stops: IntArray = np.cumsum(queries)
        self._starts: IntArray = self._stops - queries
        self._queries = queries
        self.num_tokens = int(queries.sum())
        self.write_rows = torch.from_numpy(self._write_rows())
        self._reads: dict[int | None, Reads] = {}

    def reads(self, window: int | None) -> Reads:
        """What layers with this ``window`` gather and hide."""
        reads = self._reads.get(window)
        if reads is None:
            decodes = np.flatnonzero(self._queries == 1)
            chunks = np.flatnonzero(self._queries > 1)
            reads = Reads(
                tuple(self._decode(group, window) for group in self._groups(decodes, window)),
                tuple(self._chunk(int(index), window) for index in chunks),
            )
            self._reads[window] = reads
        return reads

    def _write_rows(self) -> IntArray:
        """Cache slot rows ``[num_tokens * kv_heads]`` of this step's keys, token by token, head by head."""
        sequence = np.repeat(np.arange(len(self._pages)), self._queries)
        position = np.arange(self.num_tokens) - self._starts[sequence] + (self._contexts - self._queries)[sequence]
        lengths = np.array([len(pages) for pages in self._pages], dtype=np.int64)
        first_page = np.cumsum(lengths) - lengths
        all_pages = np.concatenate([*self._pages, np.empty(0, dtype=np.int64)])
        page = all_pages[first_page[sequence] + position // self._page_size]
        row = (page[:, None] * self._kv_heads + np.arange(self._kv_heads)) * self._page_size
        result: IntArray = (row + (position % self._page_size)[:, None]).ravel()
        return result

    def _first_page(self, index: int, window: int | None) -> int:
        """The first page that any query of sequence ``index`` can see."""
        if window is None:
            return 0
        first_query = int(self._contexts[index] - self._queries[index])
        return max(0, first_query + 1 - window) // self._page_size

    def _groups(self, decodes: IntArray, window: int | None) -> list[list[int]]:
        """Decodes in groups whose padding to the longest of the group stays small; row order within a group."""
        sizes = {
            int(index): -(-int(self._contexts[index]) // self._page_size) - self._first_page(int(index), window)
            for index in decodes
        }
        groups: list[list[int]] = []
        padded = longest = 0
        for index in sorted(sizes, key=lambda index: (-sizes[index], index)):
            padded += (longest - sizes[index]) * self._page_size
            if not groups or padded > MAX_PADDED_SLOTS:
                groups.append([])
                padded, longest = 0, sizes[index]
            groups[-1].append(index)
        return [sorted(group) for group in groups]

    def _decode(self, group: Sequence[int], window: int | None) -> DecodeRead:
        page_size = self._page_size
        firsts = [self._first_page(index, window) for index in group]
        stops = [-(-int(self._contexts[index]) // page_size) for index in group]
        num_pages = max(stop - first for first, stop in zip(firsts, stops, strict=True))
        table = np.zeros((len(group), num_pages), dtype=np.int64)  # page 0 pads
        for row, (index, first, stop) in enumerate(zip(group, firsts, stops, strict=True)):
            table[row, : stop - first] = self._pages[index][first:stop]
        context = self._contexts[group][:, None]
        slot = np.array(firsts)[:, None] * page_size + np.arange(num_pages * page_size)
        seen = slot < context
        if window is not None:
            seen &= slot >= context - window
        visible = torch.from_numpy(seen[:, None, :]).to(self._bits)
        return DecodeRead(
            rows=torch.from_numpy(self._starts[group]),
            gather=torch.from_numpy(self._head_rows(table)),
            keep=-visible,
            fill=(1 - visible) * self._minus_inf,
            num_pages=num_pages,
        )

    def _chunk(self, index: int, window: int | None) -> ChunkRead:
        context, queries = int(self._contexts[index]), int(self._queries[index])
        whole = context == queries
        first = 0 if whole else self._first_page(index, window)
        stop = -(-context // self._page_size)
        offset = context - queries - first * self._page_size
        keys = context if whole else (stop - first) * self._page_size
        query = np.arange(offset, offset + queries)[:, None]
        key = np.arange(keys)
        hidden = key > query
        if window is not None:
            hidden |= key <= query - window
        gather = None if whole else torch.from_numpy(self._head_rows(self._pages[index][None, first:stop]))
        start = int(self._starts[index])
        return ChunkRead(start, start + queries, gather, torch.from_numpy(hidden), offset, window)

    def _head_rows(self, table: IntArray) -> IntArray:
        """Pages ``[B, P]`` -> cache rows ``[B * kv_heads * P]`` in (sequence, head, page) order."""
        rows: IntArray = (table[:, None, :] * self._kv_heads + np.arange(self._kv_heads)[:, None]).ravel()
        return rows
