"""Paged causal attention by torch's ``varlen_attn`` (FlashAttention) with a block table, on CUDA.

What it takes differs from one torch to the next: block tables came with 2.12, and the FlashAttention 2 inside it asks
for pages of a multiple of 256 slots (``flash_api.cpp``: "Paged KV cache block size must be divisible by 256"). So
``available`` does not guess: it makes a small call and compares it with the reference.

Keys and values are written into the pages by the Triton kernel of this op.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn

from loraplex_kernels.attention import AttentionPlan, KVCache, SequenceSpan, StaticAttentionPlan, Target, paged_cache
from loraplex_kernels.attention.paged_cache import CacheShape, PagedCache, check_inputs, check_scale
from loraplex_kernels.attention.paged_plan import (
    IntArray,
    SpanTable,
    host_array,
    joined,
    padded_table,
    row_slots,
    span_table,
)
from loraplex_kernels.attention.reference import ReferenceAttention
from loraplex_kernels.testing import worst_excess

NEEDED = ("scale", "window_size", "enable_gqa", "seqused_k", "block_table")


#: ``torch.nn.attention.varlen.varlen_attn``, of which the arguments in NEEDED are used
VarlenKernel = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring sequences that are all decodes, or all chunks; one call."""

    rows: slice
    cu_queries: torch.Tensor  # [n + 1] int32
    cu_keys: torch.Tensor  # [n + 1] int32
    contexts: torch.Tensor  # [n] int32
    pages: torch.Tensor  # [n, most pages] int32
    max_queries: int
    max_context: int


@dataclass(frozen=True, slots=True)
class VarlenPlan:
    """A step's runs (decodes come first, so there are at most two) and where each row's key goes."""

    num_tokens: int
    slots: torch.Tensor  # [T] int32
    runs: tuple[Run, ...]


class StaticVarlenPlan:
    """One run of decodes in device memory that never moves.

    ``varlen_attn`` reads contexts and pages on the device; ``max_k`` only sizes its grid and its splits, so it is the
    capacity. A row without keys comes out as zeros, which ``refusal`` has asked of it.
    """

    def __init__(self, cache: PagedCache, max_sequences: int, max_pages: int) -> None:
        self.num_tokens = max_sequences
        self._cache = cache
        self._max_pages = max_pages
        table = padded_table(span_table((), num_pages=cache.num_pages, page_size=cache.page_size), max_sequences)
        sections, _ = _arrays(table, cache.page_size, width=max_pages)
        self._memory = torch.from_numpy(joined(sections)[0]).to(cache.device)
        reach = (slice(0, max_sequences), 1, max_pages * cache.page_size)
        plan = _plan(self._memory, sections, [reach])
        self.slots, self.runs = plan.slots, plan.runs

    def set(self, spans: Sequence[SequenceSpan]) -> bool:
        table = span_table(spans, num_pages=self._cache.num_pages, page_size=self._cache.page_size)
        if len(spans) > self.num_tokens or (table.queries != 1).any() or (table.num_pages > self._max_pages).any():
            return False
        sections, _ = _arrays(padded_table(table, self.num_tokens), self._cache.page_size, width=self._max_pages)
        self._memory.copy_(host_array(joined(sections)[0], self._cache.device), non_blocking=True)
        return True


def _arrays(
    table: SpanTable, page_size: int, *, width: int | None = None
) -> tuple[list[IntArray], list[tuple[slice, int, int]]]:
    """The write slots, then four sections a run; and each run's rows, most queries and longest context."""
    queries, contexts = table.queries, table.contexts
    sections, runs = [row_slots(table, page_size)], []
    first_page = np.cumsum(table.num_pages) - table.num_pages
    borders = [0, *(np.flatnonzero(np.diff((queries == 1).astype(np.int8))) + 1), queries.size]
    row = 0
    for start, stop in pairwise(borders):
        if start == stop:
            continue
        some = slice(start, stop)
        pages = np.zeros((stop - start, width or max(1, int(table.num_pages[some].max()))), dtype=np.int32)
        for line, first, count in zip(pages, first_page[some], table.num_pages[some], strict=True):
            line[:count] = table.pages[first : first + count]
        cumulated = (np.append(0, np.cumsum(each[some])).astype(np.int32) for each in (queries, contexts))
        sections += [*cumulated, contexts[some], pages]
        rows = slice(row, row + int(queries[some].sum()))
        runs.append((rows, int(queries[some].max()), int(contexts[some].max())))
        row = rows.stop
    return sections, runs


def _plan(memory: torch.Tensor, sections: Sequence[IntArray], runs: Sequence[tuple[slice, int, int]]) -> VarlenPlan:
    """Views of ``memory``, which holds the sections joined."""
    offsets = joined(sections)[1]
    views = [
        memory[offset : offset + section.size].view(section.shape)
        for offset, section in zip(offsets, sections, strict=True)
    ]
    made = []
    for number, (rows, most, longest) in enumerate(runs):
        cu_queries, cu_keys, contexts, pages = views[4 * number + 1 : 4 * number + 5]
        made.append(Run(rows, cu_queries, cu_keys, contexts, pages, most, longest))
    return VarlenPlan(sections[0].size, views[0], tuple(made))


class VarlenAttention:
    """The backend around one ``varlen_attn``."""

    name = "varlen"

    def __init__(self, kernel: VarlenKernel) -> None:
        # Not imported before a backend is made: this file is read on machines without triton too.
        from loraplex_kernels.attention.triton import write

        self._kernel = kernel
        self._write = write

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
        return PagedCache(shape, dtype, device, heads_first=False)

    def prepare(self, spans: Sequence[SequenceSpan], cache: KVCache) -> AttentionPlan:
        assert isinstance(cache, PagedCache), "a cache of another backend"
        table = span_table(spans, num_pages=cache.num_pages, page_size=cache.page_size)
        sections, runs = _arrays(table, cache.page_size)
        memory = host_array(joined(sections)[0], cache.device).to(cache.device, non_blocking=True)
        return _plan(memory, sections, runs)

    def static_plan(self, cache: KVCache, max_sequences: int, max_pages: int) -> StaticAttentionPlan | None:
        assert isinstance(cache, PagedCache), "a cache of another backend"
        return StaticVarlenPlan(cache, max_sequences, max_pages)

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
        assert isinstance(plan, VarlenPlan | StaticVarlenPlan), "a plan of another backend"
        check_inputs(q, k, v, cache, plan.num_tokens)
        check_scale(scale, window)
        if not plan.num_tokens:
            return q.new_empty(0, q.shape[1] * q.shape[2])
        self._write(k, v, cache=cache, layer=layer, slots=plan.slots)
        keys, values = cache.keys[layer].transpose(1, 2), cache.values[layer].transpose(1, 2)
        parts = []
        for run in plan.runs:
            # A decode sees its whole context: saying so lets the library take the query heads of a group together.
            right = -1 if window is None and run.max_queries == 1 else 0
            part = self._kernel(
                q[run.rows], keys, values, run.cu_queries, run.cu_keys, run.max_queries, run.max_context,
                scale=scale, window_size=(-1 if window is None else window - 1, right),
                enable_gqa=q.shape[1] != cache.kv_heads, seqused_k=run.contexts, block_table=run.pages,
            )  # fmt: skip
            parts.append(part.reshape(part.shape[0], -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def page_bytes(*, num_layers: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return paged_cache.page_bytes(
            num_layers=num_layers, page_size=page_size, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
        )


def library_kernel() -> VarlenKernel:
    """torch's own."""
    return cast(VarlenKernel, varlen_attn)


def missing_parameters(kernel: VarlenKernel) -> tuple[str, ...]:
    """Which of the arguments this backend passes ``kernel`` does not have."""
    return tuple(name for name in NEEDED if name not in inspect.signature(kernel).parameters)


def unfit(target: Target) -> str | None:
    """Why torch's kernel does not do for ``target``; None when it does. Makes a small step on the device."""
    missing = missing_parameters(library_kernel())
    if missing:
        return f"varlen_attn of torch {torch.__version__} has no {', '.join(missing)}"
    return refusal(VarlenAttention(library_kernel()), target)


def refusal(backend: VarlenAttention, target: Target) -> str | None:
    """Why ``backend`` does not do for ``target``, by a small step of a chunk, a decode and an empty row."""
    try:
        wrong = _probe(backend, target)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return wrong


def _probe(backend: VarlenAttention, target: Target) -> str | None:
    size, generator = target.page_size, torch.Generator().manual_seed(7)
    q, k, v = (
        torch.randn(size + 4, heads, 64, generator=generator).to(target.dtype).to(target.device) for heads in (4, 2, 2)
    )
    prompts = [SequenceSpan(1, 1, [3]), SequenceSpan(size + 1, size + 1, [2, 1])]
    decode = SequenceSpan(1, size + 2, [2, 1])
    results = []
    for each in (backend, ReferenceAttention()):
        cache = each.new_cache(
            num_layers=1,
            num_pages=4,
            page_size=size,
            kv_heads=2,
            head_dim=64,
            dtype=target.dtype,
            device=target.device,
        )
        step = partial(each.attend, layer=0, cache=cache, scale=0.2, window=None)
        first = step(q[:-2], k[:-2], v[:-2], plan=each.prepare(prompts, cache))
        plan = each.static_plan(cache, 2, 2)
        if plan is None:
            rows, made = slice(-2, -1), each.prepare([decode], cache)
        else:
            plan.set([decode])
            rows, made = slice(-2, None), plan
        second = step(q[rows], k[rows], v[rows], plan=made)
        results.append((first[1:].cpu(), torch.cat([first[:1], second[:1]]).cpu(), second[1:].cpu()))
    (chunk, decodes, padding), (right_chunk, right_decodes, _) = results
    if worst_excess(chunk, right_chunk, target.dtype) > 1:
        return "its result for a prefill chunk is wrong"
    if worst_excess(decodes, right_decodes, target.dtype) > 1:
        return "its result for a decode is wrong"
    return None if torch.equal(padding, torch.zeros_like(padding)) else "a row without keys does not come out as zeros"
