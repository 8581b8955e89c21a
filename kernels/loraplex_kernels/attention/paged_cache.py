"""The pages of the CUDA backends, and what those backends check of a layer's queries, keys and values.

Knows how pages lie in memory, not how they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from loraplex_kernels.attention.spans import check_cache


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a cache holds."""

    num_layers: int
    num_pages: int
    page_size: int
    kv_heads: int
    head_dim: int


class PagedCache:
    """All layers' pages, zeroed. ``keys[layer]`` and ``values[layer]`` are ``[num_pages, kv_heads, page_size, D]``.

    With ``heads_first`` a head's slots of one page lie side by side (what a kernel of one head at a time reads best);
    without it memory is ``[num_pages, page_size, kv_heads, D]``, what torch's varlen_attn takes, and ``keys`` is a
    transposed view of it.
    """

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device, *, heads_first: bool) -> None:
        check_cache(shape.num_pages, shape.page_size)
        page = (shape.kv_heads, shape.page_size) if heads_first else (shape.page_size, shape.kv_heads)
        sizes = (shape.num_layers, 2, shape.num_pages, *page, shape.head_dim)
        self._storage = torch.zeros(sizes, dtype=dtype, device=device)
        by_head = self._storage if heads_first else self._storage.transpose(3, 4)
        self.keys, self.values = (list(side.unbind(0)) for side in by_head.unbind(1))
        self.num_pages, self.page_size = shape.num_pages, shape.page_size
        self.kv_heads, self.head_dim = shape.kv_heads, shape.head_dim
        self.dtype, self.device = dtype, self._storage.device
        self.nbytes = self._storage.nbytes

    def zero_pages(self, pages: Sequence[int]) -> None:
        """One fill for each run of neighbouring pages: no index goes to the device, nothing waits."""
        for start, stop in _runs(sorted(pages)):
            self._storage[:, :, start:stop].zero_()


def _runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Sorted page numbers as ``start:stop`` runs."""
    start = stop = -1
    for page in pages:
        if page != stop:
            if stop > start:
                yield start, stop
            start = page
        stop = page + 1
    if stop > start:
        yield start, stop


def page_bytes(*, num_layers: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return num_layers * 2 * page_size * kv_heads * head_dim * dtype.itemsize


def check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: PagedCache, num_tokens: int) -> None:
    """Raise ValueError unless q, k and v are what the kernels take: rows and heads may lie apart, values of one not."""
    heads, kv_heads, head_dim = q.shape[1] if q.dim() == 3 else 0, cache.kv_heads, cache.head_dim
    if q.shape != (num_tokens, heads, head_dim) or heads < 1 or heads % kv_heads:
        raise ValueError(
            f"q is {tuple(q.shape)}, must be [{num_tokens}, heads, {head_dim}] with heads a multiple of the cache's "
            f"{kv_heads} kv heads"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape != (num_tokens, kv_heads, head_dim):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, must be [{num_tokens}, {kv_heads}, {head_dim}]")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype != cache.dtype or tensor.device != cache.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}; the cache is {cache.dtype} on {cache.device}"
            )
        if tensor.stride(2) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}; the values of one head must lie side by side")


def check_scale(scale: float, window: int | None) -> None:
    """Raise ValueError for a scale or a window that the contract has no meaning for."""
    if not scale > 0:
        raise ValueError(f"scale {scale}, must be above 0")
    if window is not None and window < 1:
        raise ValueError(f"window {window}, must be at least 1: a query sees itself")
