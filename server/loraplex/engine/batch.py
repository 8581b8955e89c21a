"""The one place where a Batch becomes tensors.

What a captured graph takes (``engine/graphs.py``) is made of the same pieces as what ``pack`` gives to an eager step.
Nothing here waits for the device: host values go there from pinned memory, all of a step's in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loraplex.engine.sequence import Batch, Chunk
from loraplex.models.base import ForwardBatch
from loraplex_kernels.attention import AttentionBackend, KVCache, SequenceSpan
from loraplex_kernels.lora import LoraBackend, StepPlan
from loraplex_kernels.segments import SegmentPlan, plan_rows

IntArray = npt.NDArray[np.int64]


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
    counts = np.fromiter((c.count for c in chunks), np.int64, len(chunks))
    ends = counts.cumsum()
    num_tokens = int(ends[-1])
    rows = ends[[c.sample for c in chunks]] - 1
    known = _token_ids(chunks, num_tokens) if token_ids is None else np.empty(0, np.int64)
    values = host_tensor(np.concatenate((_positions(chunks, counts, ends), rows, known)), ops.device)
    on_device = values.to(ops.device, non_blocking=True)
    sampled = on_device[num_tokens : num_tokens + len(rows)]
    forward = ForwardBatch(
        token_ids=on_device[num_tokens + len(rows) :] if token_ids is None else token_ids,
        positions=on_device[:num_tokens],
        attention=ops.attention.prepare(spans(chunks), ops.kv_cache),
        kv_cache=ops.kv_cache,
        adapters=ops.lora.prepare(plan_rows(run for c in chunks for run in c.sequence.runs(c.start, c.count))),
    )
    if len(rows) == num_tokens:  # every row is sampled: its segments are those of the step
        return Packed(forward, HeadRows(sampled, forward.adapters))
    # what is drawn follows the prompt, and so every start
    head = ops.lora.prepare(plan_rows((1, c.sequence.terms) for c in chunks if c.sample))
    return Packed(forward, HeadRows(sampled, head))


def is_decode(batch: Batch) -> bool:
    """Whether each chunk is one token whose next one is wanted: no prompt row needs a result of its own."""
    return all(c.count == 1 and c.sample for c in batch.chunks)


def spans(chunks: Sequence[Chunk]) -> list[SequenceSpan]:
    """What attention sees of each chunk."""
    return [SequenceSpan(c.count, c.start + c.count, c.sequence.pages) for c in chunks]


def decode_segments(chunks: Sequence[Chunk]) -> SegmentPlan:
    """One row for each chunk of one token, behind every start."""
    return plan_rows((1, c.sequence.terms) for c in chunks)


def decode_positions(chunks: Sequence[Chunk]) -> IntArray:
    """The position of each chunk's one token."""
    return np.fromiter((c.start for c in chunks), np.int64, len(chunks))


def decode_token_ids(chunks: Sequence[Chunk]) -> IntArray:
    """Each chunk's one token."""
    return np.fromiter((c.sequence.token_ids[c.start] for c in chunks), np.int64, len(chunks))


def host_tensor(values: IntArray, device: torch.device) -> torch.Tensor:
    """``values`` in host memory that ``device`` can copy from by itself, so that nobody waits for the copy.

    For a GPU that is pinned memory out of torch's cache, which hands a block out again only when the copies from it
    are over; a buffer of our own could be overwritten while a step that has not begun still has to read it.
    """
    tensor = torch.empty(len(values), dtype=torch.int64, pin_memory=device.type == "cuda")
    tensor.numpy()[:] = values
    return tensor


def head_rows(first: int, tokens: Chunk, ops: Ops) -> HeadRows:
    """The rows of ``tokens``, a part of a step's chunk, the first of which is row ``first``; for prompt logprobs."""
    plan = plan_rows(tokens.sequence.runs(tokens.start, tokens.count))
    return HeadRows(torch.arange(first, first + tokens.count, device=ops.device), ops.lora.prepare(plan))


def _positions(chunks: Sequence[Chunk], counts: IntArray, ends: IntArray) -> IntArray:
    starts = decode_positions(chunks)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1])


def _token_ids(chunks: Sequence[Chunk], num_tokens: int) -> IntArray:
    ids = (t for c in chunks for t in c.sequence.token_ids[c.start : c.start + c.count])
    return np.fromiter(ids, np.int64, num_tokens)
