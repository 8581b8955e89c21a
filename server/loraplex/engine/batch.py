"""The one place where a step's work becomes tensors.

What a captured graph takes (``engine/graphs.py``) is made of the same pieces as what ``pack`` gives to an eager step.
Nothing here waits for the device: host values go there from pinned memory, all of a step's in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loraplex.engine.work import StepWork, Words
from loraplex.layers.step import StateStep
from loraplex.models.base import ForwardBatch
from loraplex_kernels.attention import AttentionBackend, AttentionPlan, KVCache, SequenceSpan
from loraplex_kernels.conv import ConvBackend
from loraplex_kernels.lora import LoraBackend, StepPlan
from loraplex_kernels.segments import plan_rows
from loraplex_kernels.ssd import SsdBackend
from loraplex_kernels.states import StatePool, StateSpan, check_spans


@dataclass(frozen=True, slots=True)
class StateOps:
    """The backends of state-space layers, and the states they share."""

    conv: ConvBackend
    ssd: SsdBackend
    pool: StatePool

    def prepare(self, spans: Sequence[StateSpan]) -> StateStep:
        """A step of ``spans``; its plans are made here, once for all layers. Raises ValueError as ``check_spans``."""
        check_spans(spans, self.pool.num_slots)
        device = self.pool.device
        return StateStep(self.pool, self.conv.prepare(spans, device), self.ssd.prepare(spans, device), spans)


@dataclass(frozen=True, slots=True)
class Ops:
    """The op backends a rank runs with, the memory they share, and where all of it lives.

    ``kv_cache`` is None where the model has no attention, ``states`` where it has no state-space layers.
    """

    lora: LoraBackend
    attention: AttentionBackend
    kv_cache: KVCache | None
    device: torch.device
    states: StateOps | None = None

    def attend(self, spans: Sequence[SequenceSpan]) -> AttentionPlan | None:
        """What attention does in a step."""
        return None if self.kv_cache is None else self.attention.prepare(spans, self.kv_cache)

    def clear(self, pages: Sequence[int]) -> None:
        """Blank pages that change hands."""
        if pages and self.kv_cache is not None:
            self.kv_cache.zero_pages(pages)


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


def pack(work: StepWork, ops: Ops, token_ids: torch.Tensor | None = None) -> Packed:
    """Tensors of a step.

    ``token_ids`` ``[T]`` int64, on the device, stand for those of the work: some were drawn there, and the host may
    not know them yet.
    """
    chunks = work.chunks
    counts = np.fromiter((c.count for c in chunks), np.int64, len(chunks))
    ends = counts.cumsum()
    num_tokens = int(ends[-1])
    rows = ends[[c.sample for c in chunks]] - 1
    known = work.words[:num_tokens] if token_ids is None else np.empty(0, np.int64)
    assert token_ids is not None or not work.num_unknown, "tokens that are not known yet stand on the device alone"
    values = host_tensor(np.concatenate((_positions(work, counts, ends), rows, known)), ops.device)
    on_device = values.to(ops.device, non_blocking=True)
    sampled = on_device[num_tokens : num_tokens + len(rows)]
    forward = ForwardBatch(
        token_ids=on_device[num_tokens + len(rows) :] if token_ids is None else token_ids,
        positions=on_device[:num_tokens],
        attention=ops.attend(work.spans()),
        kv_cache=ops.kv_cache,
        adapters=ops.lora.prepare(work.segments()),
        states=None if ops.states is None else ops.states.prepare(work.state_spans()),
    )
    if len(rows) == num_tokens:  # every row is sampled: its segments are those of the step
        return Packed(forward, HeadRows(sampled, forward.adapters))
    return Packed(forward, HeadRows(sampled, ops.lora.prepare(work.sampled_segments())))


def host_tensor(values: Words, device: torch.device) -> torch.Tensor:
    """``values`` in host memory that ``device`` can copy from by itself, so that nobody waits for the copy.

    For a GPU that is pinned memory out of torch's cache, which hands a block out again only when the copies from it
    are over; a buffer of our own could be overwritten while a step that has not begun still has to read it.
    """
    tensor = torch.empty(len(values), dtype=torch.int64, pin_memory=device.type == "cuda")
    tensor.numpy()[:] = values
    return tensor


def prompt_rows(work: StepWork, index: int, first: int, count: int, ops: Ops) -> HeadRows:
    """``count`` rows of chunk ``index`` of a step, from its row ``first`` on; for prompt logprobs."""
    row = sum(chunk.count for chunk in work.chunks[:index]) + first
    plan = plan_rows(work.chunks[index].runs_of(first, count))
    return HeadRows(torch.arange(row, row + count, device=ops.device), ops.lora.prepare(plan))


def _positions(work: StepWork, counts: Words, ends: Words) -> Words:
    return np.repeat(work.starts() - (ends - counts), counts) + np.arange(ends[-1])
