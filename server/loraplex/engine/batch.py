"""The one place where a Batch becomes tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from loraplex.engine.sequence import Batch, Chunk
from loraplex.models.base import ForwardBatch
from loraplex_kernels.attention import AttentionBackend, KVCache, SequenceSpan
from loraplex_kernels.lora import LoraBackend, StepPlan
from loraplex_kernels.segments import plan_rows


@dataclass(frozen=True, slots=True)
class Ops:
    """The op backends a rank runs with, the cache they share, and where all of it lives."""

    lora: LoraBackend
    attention: AttentionBackend
    kv_cache: KVCache
    device: torch.device


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Which hidden rows go through the head, and the adapters' segments over them."""

    rows: torch.Tensor  # [S] int64
    adapters: StepPlan


@dataclass(frozen=True, slots=True)
class Packed:
    """A step ready to run: the forward pass, then the head over the rows whose next token is wanted."""

    forward: ForwardBatch
    sampled: HeadRows


def pack(batch: Batch, ops: Ops, token_ids: torch.Tensor | None = None) -> Packed:
    """Tensors of a non-empty batch.

    ``token_ids`` ``[T]`` int64, on the device, stand for the sequences' own: tokens that were drawn there and that the
    host may not know yet.
    """
    chunks = batch.chunks
    spans = [SequenceSpan(c.count, c.start + c.count, c.sequence.pages) for c in chunks]
    if token_ids is None:
        known = (t for c in chunks for t in c.sequence.token_ids[c.start : c.start + c.count])
        token_ids = torch.from_numpy(np.fromiter(known, np.int64, batch.num_tokens)).to(ops.device)
    positions = np.concatenate([np.arange(c.start, c.start + c.count) for c in chunks])
    forward = ForwardBatch(
        token_ids=token_ids,
        positions=torch.from_numpy(positions).to(ops.device),
        attention=ops.attention.prepare(spans, ops.kv_cache),
        kv_cache=ops.kv_cache,
        adapters=ops.lora.prepare(plan_rows((c.count, c.sequence.terms) for c in chunks)),
    )
    return Packed(forward, _sampled_rows(chunks, ops))


def _sampled_rows(chunks: list[Chunk], ops: Ops) -> HeadRows:
    ends = np.cumsum([c.count for c in chunks])
    rows = [int(end) - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.sample]
    plan = plan_rows((1, c.sequence.terms) for c in chunks if c.sample)
    return HeadRows(torch.tensor(rows, dtype=torch.int64, device=ops.device), ops.lora.prepare(plan))


def head_rows(first: int, count: int, chunk: Chunk, ops: Ops) -> HeadRows:
    """Rows ``first : first+count`` of one chunk's sequence, for prompt logprobs."""
    plan = plan_rows([(count, chunk.sequence.terms)])
    return HeadRows(torch.arange(first, first + count, device=ops.device), ops.lora.prepare(plan))
