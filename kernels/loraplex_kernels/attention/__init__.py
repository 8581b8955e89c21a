"""Causal attention over a paged key/value cache, prefill chunks and decodes of many sequences in one call.

Contract, for every sequence s with query rows ``cu[s]:cu[s+1]`` (n of them), context length L (this step's rows
included) and page list P::

    cache[P[j // page_size], j % page_size] = k, v           for the n new positions j = L-n .. L-1
    out[row i] = softmax(scale * q_i . K[lo_i : p_i+1]) V[lo_i : p_i+1]       p_i = L - n + i,
                                                             lo_i = max(0, p_i + 1 - window) or 0 without a window

q is ``[T, heads, head_dim]``, k and v are ``[T, kv_heads, head_dim]``, out is ``[T, heads * head_dim]``; heads is a
multiple of kv_heads (grouped queries); scale > 0. Softmax in float32. Page 0 is never handed to a sequence: it pads
page lists and stays zero. Slots past a sequence's context may hold anything finite; what they hold never changes a
result, nor does anything another sequence's pages hold. Sequences with one query row come first (decodes), then
prefill chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Target:
    """What a backend is chosen for: where it runs, and the caches it is to make."""

    device: torch.device
    dtype: torch.dtype
    page_size: int

    def __str__(self) -> str:
        return str(self.device)


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence's part of a step."""

    num_queries: int
    context_len: int
    pages: Sequence[int]


class AttentionPlan(Protocol):
    """The spans of a step made ready by one backend: index tensors, written once a step, shared by all layers."""

    @property
    def num_tokens(self) -> int: ...


class StaticAttentionPlan(AttentionPlan, Protocol):
    """A plan of decodes whose device memory never moves, for a captured graph: ``set`` writes other spans into it.

    It has one query row for each of its ``max_sequences``. Rows past the spans given are padding: nothing is written
    for them, and their rows of out are zero. Fresh, all rows are padding.
    """

    def set(self, spans: Sequence[SequenceSpan]) -> bool:
        """Make these the spans of the next replay; False, and nothing changed, when they do not fit or are no decodes.

        Raises ValueError as ``prepare`` does.
        """
        ...


class KVCache(Protocol):
    """All layers' pages. The backend owns the layout."""

    num_pages: int
    page_size: int
    nbytes: int

    def zero_pages(self, pages: Sequence[int]) -> None:
        """Clear pages before a new owner gets them, so that no stale non-finite value can be gathered."""
        ...


class AttentionBackend(Protocol):
    """Makes caches and step plans, and attends. Chosen once at start."""

    name: str

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
    ) -> KVCache: ...

    def prepare(self, spans: Sequence[SequenceSpan], cache: KVCache) -> AttentionPlan: ...

    def static_plan(self, cache: KVCache, max_sequences: int, max_pages: int) -> StaticAttentionPlan | None:
        """A plan for captured graphs: up to ``max_sequences`` decodes of up to ``max_pages`` pages each.

        None: this backend's kernels cannot be captured.
        """
        ...

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
        """Write k and v of this step into ``layer``'s pages, then attend. Returns out."""
        ...

    @staticmethod
    def page_bytes(*, num_layers: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one page takes over all layers, for the memory budget."""
        ...
