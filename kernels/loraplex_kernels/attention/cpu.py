"""Paged causal attention on a CPU: one gather of K and V for many decodes, grouped-query products, float32 softmax.

Layout: per layer K and V are ``[num_pages * kv_heads, page_size * head_dim]``, a row being one head's slots of one
page. Gathering the rows (sequence, head, page) in that order gives ``[sequences * kv_heads, L, head_dim]`` in one
``index_select``, ready for a batched product with the queries of one group as its rows. Scores are rounded once to q's
dtype, because the batched product has no float32 output for half-width inputs; all of the softmax is float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loraplex_kernels.attention import AttentionPlan, KVCache, SequenceSpan, StaticAttentionPlan
from loraplex_kernels.attention.cpu_plan import ChunkRead, CpuAttentionPlan, DecodeRead
from loraplex_kernels.attention.spans import check_cache, check_spans

# Query rows of a prefill chunk handled at once: bounds the score matrix and skips the keys past the block. 128 was
# as fast as 64 and 3x faster than the whole chunk at 512 rows (scores stay in cache).
QUERY_BLOCK = 128


class CpuCache:
    """All layers' pages; ``keys[layer]`` and ``values[layer]`` as the module says, plus slot-wise views to write by."""

    def __init__(self, storage: torch.Tensor, *, page_size: int) -> None:
        """``storage`` is ``[2, layers, num_pages, kv_heads, page_size, head_dim]``, zeroed."""
        self.num_pages, self.kv_heads = storage.shape[2], storage.shape[3]
        self.page_size = page_size
        self.nbytes = storage.nbytes
        self.dtype = storage.dtype
        self._storage = storage
        head_dim = storage.shape[5]
        rows = self.num_pages * self.kv_heads
        self.keys, self.values = (
            [layer.view(rows, page_size * head_dim) for layer in side.unbind(0)] for side in storage.unbind(0)
        )
        self.key_slots, self.value_slots = (
            [layer.view(rows * page_size, head_dim) for layer in side.unbind(0)] for side in storage.unbind(0)
        )

    def zero_pages(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._storage[:, :, page].zero_()


class CpuAttention:
    """The fast backend for CPU tensors."""

    name = "cpu"

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
        shape = (2, num_layers, num_pages, kv_heads, page_size, head_dim)
        return CpuCache(torch.zeros(shape, dtype=dtype, device=device), page_size=page_size)

    def prepare(self, spans: Sequence[SequenceSpan], cache: KVCache) -> AttentionPlan:
        assert isinstance(cache, CpuCache), "a cache of another backend"
        check_spans(spans, num_pages=cache.num_pages, page_size=cache.page_size)
        return CpuAttentionPlan(tuple(spans), page_size=cache.page_size, kv_heads=cache.kv_heads, dtype=cache.dtype)

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
        assert isinstance(cache, CpuCache), "a cache of another backend"
        assert isinstance(plan, CpuAttentionPlan), "a plan of another backend"
        num_tokens, heads, head_dim = q.shape
        flat = (num_tokens * cache.kv_heads, head_dim)
        cache.key_slots[layer].index_copy_(0, plan.write_rows, k.reshape(flat))
        cache.value_slots[layer].index_copy_(0, plan.write_rows, v.reshape(flat))
        reads = plan.reads(window)
        keys, values = cache.keys[layer], cache.values[layer]
        if not reads.chunks and len(reads.decodes) == 1:
            return _decode(q, keys, values, reads.decodes[0], scale).view(num_tokens, heads * head_dim)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for decode in reads.decodes:
            attended = _decode(q.index_select(0, decode.rows), keys, values, decode, scale)
            out.index_copy_(0, decode.rows, attended)
        for chunk in reads.chunks:
            rows = slice(chunk.start, chunk.stop)
            if chunk.gather is None:  # the whole context is in this step
                context = k[rows].transpose(0, 1), v[rows].transpose(0, 1)
            else:
                shape = (cache.kv_heads, -1, head_dim)
                context = (
                    keys.index_select(0, chunk.gather).view(shape),
                    values.index_select(0, chunk.gather).view(shape),
                )
            _attend_chunk(out[rows], q[rows], context, chunk, scale)
        return out.view(num_tokens, heads * head_dim)

    @staticmethod
    def page_bytes(*, num_layers: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_layers * 2 * page_size * kv_heads * head_dim * dtype.itemsize


def _decode(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, read: DecodeRead, scale: float) -> torch.Tensor:
    """``[B, heads, head_dim]`` for one query row per sequence."""
    batch, heads, head_dim = q.shape
    kv_heads = read.gather.shape[0] // (batch * read.num_pages)
    group = heads // kv_heads
    shape = (batch * kv_heads, -1, head_dim)
    context_k = keys.index_select(0, read.gather).view(shape)  # [B * kv_heads, L, D]
    context_v = values.index_select(0, read.gather).view(shape)
    grouped = q.reshape(batch * kv_heads, group, head_dim)
    scores = torch.bmm(grouped, context_k.transpose(1, 2))  # [B * kv_heads, group, L]
    scores.view(read.keep.dtype).view(batch, heads, -1).bitwise_and_(read.keep).bitwise_or_(read.fill)
    weights = scores.to(torch.float32).mul_(scale).softmax(-1).to(q.dtype)
    return torch.bmm(weights, context_v).view(batch, heads, head_dim)


def _attend_chunk(
    out: torch.Tensor, q: torch.Tensor, context: tuple[torch.Tensor, torch.Tensor], chunk: ChunkRead, scale: float
) -> None:
    """Fill ``out`` ``[n, heads, D]``: n query rows of one sequence over its keys and values ``[kv_heads, L, D]``."""
    keys, values = context
    num_queries, heads, head_dim = q.shape
    kv_heads = keys.shape[0]
    for start in range(0, num_queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, num_queries)
        first, last = chunk.keys_of(start, stop)
        rows = stop - start
        block = q[start:stop].transpose(0, 1).reshape(kv_heads, heads // kv_heads * rows, head_dim)
        scores = torch.bmm(block, keys[:, first:last].transpose(1, 2)).float().mul_(scale)
        scores.view(heads, rows, -1).masked_fill_(chunk.hidden[start:stop, first:last], float("-inf"))
        weights = scores.softmax(-1).to(q.dtype)
        out[start:stop] = torch.bmm(weights, values[:, first:last]).view(heads, rows, head_dim).transpose(0, 1)
