"""Capture without a GPU: a tape of tensor ops in the place of a graph, and backends with static plans beside it.

The tape knows nothing but tensors: replaying it runs none of the step's Python. What a step decided on the host while
it was captured therefore stays decided, as in a real graph, and a value that came from the host stays what it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraplex_kernels.attention import AttentionPlan, KVCache, SequenceSpan
from loraplex_kernels.attention.reference import ReferenceAttention, ReferenceCache
from loraplex_kernels.attention.spans import check_spans
from loraplex_kernels.lora import LoraTable, Packed, SlotDelta, StepPlan
from loraplex_kernels.lora.reference import ReferenceLora
from loraplex_kernels.segments import Segment, SegmentPlan, Term

aten = torch.ops.aten
#: ops that a GPU's graph cannot hold: the host waits for their result, or gives them values of its own
_FORBIDDEN: Final = {
    aten._local_scalar_dense.default: "the host waits for a value",
    aten.nonzero.default: "the host waits for a shape",
    aten.equal.default: "the host waits for an answer",
    aten.lift_fresh.default: "a tensor is made of host values",
}
#: slots, and the largest rank, that a tape table holds
SLOTS: Final = 16
RANK: Final = 16
TERMS: Final = 8


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _FORBIDDEN.get(func):
            raise RuntimeError(f"{func} while capturing: {_FORBIDDEN[func]}")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class TapeCapture:
    """A GraphCapture for the CPU. ``captured`` counts; ``refuse_at`` makes that capture fail; ``on_replay`` is told of
    how many rows the last tensor is that a replayed step writes."""

    nbytes = 4096

    def __init__(self, on_replay: Callable[[int], None] = lambda _: None) -> None:
        self._on_replay = on_replay
        self.captured = 0
        self.replayed = 0
        self.refuse_at = -1
        self.refusal: Exception = RuntimeError("operation not permitted when stream is capturing")

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        if self.captured == self.refuse_at:
            raise self.refusal
        step()  # warm-up
        recorder = _Recorder()
        with recorder:
            step()
        self.captured += 1
        num_rows = len(recorder.calls[-1][3]) if recorder.calls and recorder.calls[-1][3].dim() else 0

        def replay() -> None:
            self.replayed += 1
            self._on_replay(num_rows)
            for func, args, kwargs, before in recorder.calls:
                after = func(*args, **kwargs)
                for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                    if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                        old.copy_(new)

        return replay


class RerunCapture:
    """A GraphCapture that calls the step again: for kernels that the tape cannot see."""

    nbytes = 0

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            step()

        return replay


class TapeStepPlan:
    """Per row, slots and weights, in tensors that stay where they are."""

    def __init__(self, backend: TapeLora, max_rows: int, max_terms: int) -> None:
        self._backend = backend
        self._max_terms = max_terms
        self.slots = torch.zeros(max_rows, TERMS, dtype=torch.int64)
        self.weights = torch.zeros(max_rows, TERMS)
        self.segments = SegmentPlan(max_rows, (Segment(0, 1, (Term(0),)),))
        self.scales_input = False

    @property
    def keys(self) -> tuple[str, ...]:
        return ("plain", "scaled")

    def capturing(self, key: Hashable) -> TapeStepPlan:
        plan = copy.copy(self)
        plan.scales_input = key == "scaled"
        return plan

    def mixed(self, vectors: torch.Tensor, neutral: float) -> torch.Tensor:
        """Of ``vectors`` ``[SLOTS, n]``, each row's weighted sum of what they change, ``[rows, n]``."""
        changes = self.weights.unsqueeze(-1) * (vectors[self.slots] - neutral)  # [rows, TERMS, n]
        return neutral + torch.where(self.weights.unsqueeze(-1) != 0, changes, 0.0).sum(1)

    def set(self, plan: SegmentPlan) -> bool:
        self._backend.prepare(plan)
        if plan.num_rows > len(self.slots) or sum(len(s.terms) for s in plan.segments) > self._max_terms:
            return False
        self.slots.zero_()
        self.weights.zero_()
        for segment in plan.segments:
            for index, term in enumerate(segment.terms):
                self.slots[segment.start : segment.stop, index] = term.slot
                self.weights[segment.start : segment.stop, index] = term.weight
        self.segments = plan
        return True


class TapeTable:
    """A reference table, and the same factors, scales and shifts stacked by slot for captured steps."""

    def __init__(self, eager: LoraTable, scaling: set[tuple[int, int]]) -> None:
        """``scaling``: slots that scale an input, each with the table where it does."""
        self.in_features = eager.in_features
        self.part_sizes = eager.part_sizes
        self._eager = eager
        self._a = [torch.zeros(SLOTS, RANK, eager.in_features) for _ in eager.part_sizes]
        self._b = [torch.zeros(SLOTS, size, RANK) for size in eager.part_sizes]
        self._out_scales = torch.ones(SLOTS, sum(eager.part_sizes))
        self._shifts = torch.zeros(SLOTS, sum(eager.part_sizes))
        self._in_scales = torch.ones(SLOTS, eager.in_features)
        self._scaling = scaling

    def pack(self, delta: SlotDelta) -> Packed:
        return self._eager.pack(delta)

    def write(self, slot: int, packed: Packed) -> None:
        self._eager.write(slot, packed)
        self._empty(slot)
        delta: SlotDelta = packed.delta  # type: ignore[attr-defined]
        column = 0
        for part, size, a, b in zip(delta.parts, self.part_sizes, self._a, self._b, strict=True):
            columns = slice(column, column + size)
            column += size
            if part is None:
                continue
            if part.factors is not None:
                rank = len(part.factors.a)
                a[slot, :rank] = part.factors.a
                b[slot, :, :rank] = part.factors.b
            if part.out_scale is not None:
                self._out_scales[slot, columns] = part.out_scale
            if part.shift is not None:
                self._shifts[slot, columns] = part.shift
        if delta.in_scale is not None:
            self._in_scales[slot] = delta.in_scale
            self._scaling.add((slot, id(self)))

    def clear(self, slot: int) -> None:
        self._eager.clear(slot)
        self._empty(slot)

    def scale_input(self, x: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        if not isinstance(plan, TapeStepPlan):
            return self._eager.scale_input(x, plan)
        return x * plan.mixed(self._in_scales, 1.0) if plan.scales_input else x

    def add_(self, y: torch.Tensor, x: torch.Tensor, plan: StepPlan) -> None:
        if not isinstance(plan, TapeStepPlan):
            return self._eager.add_(y, x, plan)
        return self._add(y, plan, lambda a: a @ x.unsqueeze(-1))

    def add_lookup_(self, y: torch.Tensor, token_ids: torch.Tensor, plan: StepPlan) -> None:
        if not isinstance(plan, TapeStepPlan):
            return self._eager.add_lookup_(y, token_ids, plan)
        index = token_ids.view(-1, 1, 1).expand(-1, RANK, 1)
        return self._add(y, plan, lambda a: a.gather(2, index))

    def _add(self, y: torch.Tensor, plan: TapeStepPlan, shrink: Callable[[torch.Tensor], torch.Tensor]) -> None:
        assert len(y) == len(plan.slots)
        y *= plan.mixed(self._out_scales, 1.0)
        y += plan.mixed(self._shifts, 0.0)
        column = 0
        for a, b, size in zip(self._a, self._b, self.part_sizes, strict=True):
            for term in range(TERMS):
                slots, weight = plan.slots[:, term], plan.weights[:, term].unsqueeze(-1)
                added = (b[slots] @ shrink(a[slots])).squeeze(-1)  # [rows, size]
                y[:, column : column + size] += torch.where(weight != 0, weight * added, 0.0)
            column += size

    def _empty(self, slot: int) -> None:
        for stacked in (*self._a, *self._b, self._shifts):
            stacked[slot] = 0
        for scales in (self._in_scales, self._out_scales):
            scales[slot] = 1
        self._scaling.discard((slot, id(self)))


class TapeLora(ReferenceLora):
    """The reference backend with tables that a tape can capture. ``odd_slots`` need kernels of their own."""

    name = "tape"

    def __init__(self) -> None:
        super().__init__()
        self.odd_slots: set[int] = set()
        self._scaling: set[tuple[int, int]] = set()

    def new_table(
        self, in_features: int, part_sizes: tuple[int, ...], *, dtype: torch.dtype, device: torch.device, max_bytes: int
    ) -> LoraTable:
        eager = super().new_table(in_features, part_sizes, dtype=dtype, device=device, max_bytes=max_bytes)
        return TapeTable(eager, self._scaling)

    def static_plan(self, max_rows: int, max_terms: int) -> TapeStepPlan:
        return TapeStepPlan(self, max_rows, max_terms)

    def graph_key(self, plan: SegmentPlan) -> Hashable:
        slots = {term.slot for segment in plan.segments for term in segment.terms}
        if slots & self.odd_slots:
            return "odd"
        return "scaled" if slots & {slot for slot, _ in self._scaling} else "plain"


class TapeAttentionPlan:
    """Page tables and context lengths of decodes, in tensors that stay where they are; context 0 is padding."""

    def __init__(self, cache: KVCache, max_sequences: int, max_pages: int) -> None:
        self._cache = cache
        self.num_tokens = max_sequences
        self.pages = torch.zeros(max_sequences, max_pages, dtype=torch.int64)
        self.contexts = torch.zeros(max_sequences, dtype=torch.int64)

    def set(self, spans: Sequence[SequenceSpan]) -> bool:
        check_spans(spans, num_pages=self._cache.num_pages, page_size=self._cache.page_size)
        max_sequences, max_pages = self.pages.shape
        if len(spans) > max_sequences or any(s.num_queries != 1 or len(s.pages) > max_pages for s in spans):
            return False
        self.pages.zero_()
        self.contexts.zero_()
        for row, span in enumerate(spans):
            self.pages[row, : len(span.pages)] = torch.tensor(span.pages)
            self.contexts[row] = span.context_len
        return True


class TapeAttention(ReferenceAttention):
    """The reference backend with decodes that a tape can capture."""

    name = "tape"

    def static_plan(self, cache: KVCache, max_sequences: int, max_pages: int) -> TapeAttentionPlan:
        return TapeAttentionPlan(cache, max_sequences, max_pages)

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
        if not isinstance(plan, TapeAttentionPlan):
            return super().attend(q, k, v, layer=layer, cache=cache, plan=plan, scale=scale, window=window)
        assert isinstance(cache, ReferenceCache)
        real = plan.contexts > 0
        last = (plan.contexts - 1).clamp(min=0)
        page = plan.pages.gather(1, (last // cache.page_size).unsqueeze(1)).squeeze(1)
        slot = last % cache.page_size
        for side, new in enumerate((k, v)):  # padding rows write the zeros that page 0 holds already
            cache.pages[layer, side].index_put_((page, slot), torch.where(real.view(-1, 1, 1), new, 0.0))
        keys, values = (cache.pages[layer, side][plan.pages].flatten(1, 2).float() for side in (0, 1))
        position = torch.arange(keys.shape[1])
        seen = position < plan.contexts.unsqueeze(1)  # [S, L]
        if window is not None:
            seen &= position > (last - window).unsqueeze(1)
        group = q.shape[1] // k.shape[1]
        keys, values = (torch.where(seen[..., None, None], t, 0.0).repeat_interleave(group, 2) for t in (keys, values))
        scores = scale * torch.einsum("shd,slhd->shl", q.float(), keys)
        weights = scores.masked_fill(~seen.unsqueeze(1), float("-inf")).softmax(-1)
        out = torch.einsum("shl,slhd->shd", weights, values)
        return torch.where(real.view(-1, 1, 1), out, 0.0).to(q.dtype).flatten(1)
