"""Capture without a GPU: a tape of tensor ops in the place of a graph, and backends with static plans beside it.

The tape knows nothing but tensors: replaying it runs none of the step's Python. What a step decided on the host while
it was captured therefore stays decided, as in a real graph, and a value that came from the host stays what it was.
"""

from __future__ import annotations

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
    """A GraphCapture for the CPU. ``captured`` counts; ``refuse_at`` makes that capture fail."""

    nbytes = 4096

    def __init__(self) -> None:
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

        def replay() -> None:
            self.replayed += 1
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
    """A reference table, and the same factors stacked by slot for captured steps."""

    def __init__(self, eager: LoraTable) -> None:
        self.in_features = eager.in_features
        self.part_sizes = eager.part_sizes
        self._eager = eager
        self._a = [torch.zeros(SLOTS, RANK, eager.in_features) for _ in eager.part_sizes]
        self._b = [torch.zeros(SLOTS, size, RANK) for size in eager.part_sizes]

    def pack(self, delta: SlotDelta) -> Packed:
        return self._eager.pack(delta)

    def write(self, slot: int, packed: Packed) -> None:
        self._eager.write(slot, packed)
        self._empty(slot)
        for part, a, b in zip(packed.delta.parts, self._a, self._b, strict=True):  # type: ignore[attr-defined]
            if part is not None:
                assert part.out_scale is None, "the tape's tables hold factors alone"
                assert part.shift is None, "the tape's tables hold factors alone"
                rank = len(part.factors.a)
                a[slot, :rank] = part.factors.a
                b[slot, :, :rank] = part.factors.b

    def clear(self, slot: int) -> None:
        self._eager.clear(slot)
        self._empty(slot)

    def scale_input(self, x: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        return x

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
        column = 0
        for a, b, size in zip(self._a, self._b, self.part_sizes, strict=True):
            for term in range(TERMS):
                slots, weight = plan.slots[:, term], plan.weights[:, term].unsqueeze(-1)
                added = (b[slots] @ shrink(a[slots])).squeeze(-1)  # [rows, size]
                y[:, column : column + size] += torch.where(weight != 0, weight * added, 0.0)
            column += size

    def _empty(self, slot: int) -> None:
        for stacked in (*self._a, *self._b):
            stacked[slot] = 0


class TapeLora(ReferenceLora):
    """The reference backend with tables that a tape can capture. ``odd_slots`` need kernels of their own."""

    name = "tape"

    def __init__(self) -> None:
        super().__init__()
        self.odd_slots: set[int] = set()

    def new_table(
        self, in_features: int, part_sizes: tuple[int, ...], *, dtype: torch.dtype, device: torch.device, max_bytes: int
    ) -> LoraTable:
        eager = super().new_table(in_features, part_sizes, dtype=dtype, device=device, max_bytes=max_bytes)
        return TapeTable(eager)

    def static_plan(self, max_rows: int, max_terms: int) -> TapeStepPlan:
        return TapeStepPlan(self, max_rows, max_terms)

    def graph_key(self, plan: SegmentPlan) -> Hashable:
        return bool(plan.segments), any(term.slot in self.odd_slots for s in plan.segments for term in s.terms)


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
