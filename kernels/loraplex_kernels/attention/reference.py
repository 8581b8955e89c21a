"""Paged causal attention, written to be checked by eye: one sequence, one query head at a time, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex_kernels.attention import AttentionPlan, KVCache, SequenceSpan, StaticAttentionPlan
from loraplex_kernels.attention.spans import check_cache, check_spans


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """The spans as they are."""

    spans: tuple[SequenceSpan, ...]
    num_tokens: int


class ReferenceCache:
    """One tensor ``[layers, 2, num_pages, page_size, kv_heads, head_dim]``: k is 0, v is 1."""

    def __init__(self, pages: torch.Tensor) -> None:
        self.pages = pages
        self.num_pages = pages.shape[2]
        self.page_size = pages.shape[3]
        self.nbytes = pages.nbytes

    def zero_pages(self, pages: Sequence[int]) -> None:
        self.pages[:, :, list(pages)] = 0


class ReferenceAttention:
    """The backend every other one is compared with. Runs anywhere, fast nowhere."""

    name = "reference"

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
        check_cache(num_pages, page_size)
        shape = (num_layers, 2, num_pages, page_size, kv_heads, head_dim)
        return ReferenceCache(torch.zeros(shape, dtype=dtype, device=device))

    def prepare(self, spans: Sequence[SequenceSpan], cache: KVCache) -> AttentionPlan:
        check_spans(spans, num_pages=cache.num_pages, page_size=cache.page_size)
        return ReferencePlan(tuple(spans), sum(span.num_queries for span in spans))

    def static_plan(self, cache: KVCache, max_sequences: int, max_pages: int) -> StaticAttentionPlan | None:
        del cache, max_sequences, max_pages
        return None

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
        assert isinstance(cache, ReferenceCache)
        assert isinstance(plan, ReferencePlan)
        pages = cache.pages[layer]
        num_tokens, heads, head_dim = q.shape
        group = heads // k.shape[1]
        out = q.new_zeros(num_tokens, heads, head_dim)
        row = 0
        for span in plan.spans:
            rows = slice(row, row + span.num_queries)
            start = span.context_len - span.num_queries
            for i, position in enumerate(range(start, span.context_len)):
                page, slot = span.pages[position // cache.page_size], position % cache.page_size
                pages[0, page, slot] = k[row + i]
                pages[1, page, slot] = v[row + i]
            # [L, kv_heads, head_dim]
            keys, values = (pages[side, list(span.pages)].flatten(0, 1)[: span.context_len].float() for side in (0, 1))
            hidden = hidden_keys(start, span.context_len, window, q.device)  # [n, L]
            for head in range(heads):
                scores = scale * q[rows, head].float() @ keys[:, head // group].T  # [n, L]
                weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
                out[rows, head] = (weights @ values[:, head // group]).to(q.dtype)
            row += span.num_queries
        return out.flatten(1)

    @staticmethod
    def page_bytes(*, num_layers: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_layers * 2 * page_size * kv_heads * head_dim * dtype.itemsize


def hidden_keys(start: int, context_len: int, window: int | None, device: torch.device) -> torch.Tensor:
    """True where the query at position ``start + i`` must not see key j: ``[context_len - start, context_len]``."""
    query = torch.arange(start, context_len, device=device)[:, None]
    key = torch.arange(context_len, device=device)[None, :]
    hidden = key > query
    return hidden if window is None else hidden | (key <= query - window)
