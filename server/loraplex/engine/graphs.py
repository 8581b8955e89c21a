"""Decode under captured graphs: the whole step from token ids to logits is one launch.

A graph replays the kernels it was captured with, over the memory they were captured with. So there is one for each
batch size that is worth one (a *bucket*; smaller batches are padded up to it), each in two variants: without adapter
nodes, for steps in which every row is base-only, and with them. Adapters that need further nodes (IA3 scales inputs)
would slow all others down if every graph had them: for these steps some buckets, each twice the last, have a third
variant. What changes from step to step is written into memory that never moves: token ids, positions, and the backends'
static plans. Which adapters there are, their ranks and their slots may change at will between replays, because kernels
find them through what lies on the device. States that such a step saves are copied behind its replay.

A merged form multiplies by matrices of its own. A step that one has to itself gets a graph over these when its bucket
first has such a step, in the middle of serving; it goes with the form.

Knows nothing of CUDA: how a step is captured is ``GraphCapture``'s. Owned by the runner.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol
from weakref import WeakKeyDictionary

import torch

from loraplex.engine.batch import Ops, StateOps, host_tensor
from loraplex.engine.memory import taking_memory
from loraplex.engine.sequence import Run
from loraplex.engine.work import StepWork
from loraplex.errors import GroupLost, InternalError, OverCapacity
from loraplex.layers.rows_memory import MergedForm
from loraplex.layers.step import StateStep
from loraplex.models.base import BaseModel, ForwardBatch
from loraplex_kernels.attention import StaticAttentionPlan
from loraplex_kernels.conv import StaticConvPlan
from loraplex_kernels.lora import StaticStepPlan
from loraplex_kernels.segments import SegmentPlan, Term, plan_rows
from loraplex_kernels.ssd import StaticSsdPlan
from loraplex_kernels.states import StatePool

log = logging.getLogger("loraplex.engine")

Replay = Callable[[], None]
"""Runs what was captured once more; like any launch, it does not wait for the device."""

Progress = Callable[[int, int], None]
"""Called as ``progress(graphs_done, graphs_total)``."""

#: A decode step reads every weight whatever its size, and matrix units work on 8 rows at a time: up to 64 a bucket
#: every 8 rows pads with rows that cost next to nothing. Above, buckets are further apart, because each one takes
#: start time and memory; padding then stays below a fifth of the rows.
_STRIDES: Final = ((64, 8), (256, 16))
_WIDEST_STRIDE: Final = 32
_SMALL: Final = (1, 2, 4)
#: weighted adapters that a graph has room for, per row; a step whose requests mix more of them on average runs eagerly
_TERMS_PER_ROW: Final = 2
#: and at least so many, so that one request may mix as many as it is allowed to
_LEAST_TERMS: Final = 8


class GraphCapture(Protocol):
    """Turns a function that launches device work into something that launches all of it again at once."""

    def capture(self, step: Callable[[], None]) -> Replay:
        """Capture ``step``, which may be called several times for that. Its tensors stay where they are.

        Raises what the step raises, and RuntimeError when it does what cannot be captured, as waiting for the device.
        """
        ...

    @property
    def nbytes(self) -> int:
        """Device memory taken since this was made."""
        ...


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """The largest decode batch, and the longest sequence in it."""

    max_num_seqs: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Memory that every graph reads from and writes to; a bucket takes the first rows."""

    token_ids: torch.Tensor  # [max_num_seqs] int64
    positions: torch.Tensor  # [max_num_seqs] int64
    logits: torch.Tensor  # [max_num_seqs, V] float32


@dataclass(frozen=True, slots=True)
class _StaticStates:
    """What a bucket's state-space layers do; of the same sequences."""

    conv: StaticConvPlan
    ssd: StaticSsdPlan

    def set(self, work: StepWork) -> bool:
        """Make the step's sequences those of the next replay; False when they do not fit. What is saved is copied
        behind the replay."""
        spans = [replace(span, saves=()) if span.saves else span for span in work.state_spans()]
        return self.conv.set(spans) and self.ssd.set(spans)

    def pad(self) -> None:
        """Make all sequences of the next replay padding."""
        self.conv.set(())
        self.ssd.set(())

    def step(self, pool: StatePool) -> StateStep:
        """What layers are captured with."""
        return StateStep(pool, self.conv, self.ssd, ())


@dataclass(frozen=True, slots=True)
class _Bucket:
    """One batch size: its plans, what a step of it is without adapters, and its graphs."""

    forward: ForwardBatch
    attention: StaticAttentionPlan | None
    states: _StaticStates | None
    adapters: StaticStepPlan
    without_adapters: Replay
    #: by what a step's plan answers to ``graph_key``
    with_adapters: Mapping[Hashable, Replay]

    @property
    def num_rows(self) -> int:
        return len(self.forward.token_ids)

    def pad(self) -> None:
        """Make all rows of the next replay padding, which changes neither cache nor states."""
        if self.attention is not None:
            self.attention.set(())
        if self.states is not None:
            self.states.pad()


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """The batch sizes to capture, smallest first: 1, 2, 4, 8, 16, 24 ... and ``max_num_seqs`` itself."""
    sizes = [size for size in _SMALL if size < max_num_seqs]
    size = 0
    for last, stride in (*_STRIDES, (max_num_seqs, _WIDEST_STRIDE)):
        while size < last:
            size += stride
            if size < max_num_seqs:
                sizes.append(size)
    return (*sizes, max_num_seqs)


def why_not(ops: Ops) -> str:
    """Which backends cannot be captured; empty when all can."""
    static: dict[str, object | None] = {
        f"lora backend {ops.lora.name!r}": ops.lora.static_plan(1, 1),
    }
    if ops.kv_cache is not None:
        static[f"attention backend {ops.attention.name!r}"] = ops.attention.static_plan(ops.kv_cache, 1, 1)
    if ops.states is not None:
        conv, ssd, device = ops.states.conv, ops.states.ssd, ops.device
        static[f"conv backend {conv.name!r}"] = conv.static_plan(1, device)
        static[f"ssd backend {ssd.name!r}"] = ssd.static_plan(1, device)
    return " and ".join(f"{name} cannot be captured" for name, plan in static.items() if plan is None)


class DecodeGraphs:
    """The graphs of one model over one cache. Made once, at start: capturing takes a while."""

    def __init__(
        self, model: BaseModel, ops: Ops, limits: GraphLimits, capture: GraphCapture, progress: Progress
    ) -> None:
        """Capture every bucket, largest first, so that smaller ones find their memory taken already.

        Raises InternalError naming the bucket that could not be captured, OverCapacity when memory ran out at it,
        GroupLost when another rank went away.
        """
        self._model = model
        self._ops = ops
        self._max_pages = 0 if ops.kv_cache is None else -(-limits.max_model_len // ops.kv_cache.page_size)
        self._capture = capture
        self._sizes = bucket_sizes(limits.max_num_seqs)
        self._unknown_keys: set[Hashable] = set()
        #: by the batch size of their bucket; None: it could not be captured
        self._merged: WeakKeyDictionary[MergedForm, dict[int, Replay | None]] = WeakKeyDictionary()
        self._runs: list[Run] = []
        self._plan = SegmentPlan(0, ())
        with torch.inference_mode():
            self._buffers = _buffers(limits.max_num_seqs, model)
            self._buckets = self._capture_all(progress)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes that have graphs, smallest first."""
        return self._sizes

    def run(self, work: StepWork, token_ids: torch.Tensor) -> torch.Tensor | None:
        """Logits ``[S, V]`` float32 of a step of decodes, one row for each chunk, in order.

        ``token_ids`` ``[S]`` int64 are on the device, or where it copies from by itself (``host_tensor``). None: this
        step is not for a graph (it has a prefill chunk, is too large, mixes too many adapters, has an adapter with
        rows of its own that is no merged form, or needs kernels that no graph has), and nothing was launched. All ranks
        of a group answer alike: a graph's sums are of its bucket's rows, others of the step's own.
        The result is overwritten by the next call; work launched before that, on the same stream, sees it whole.

        Raises ValueError as the backends' ``prepare`` does; OverCapacity where one rank of a group has no memory for a
        merged form's graph.
        """
        if not 0 < len(work.chunks) <= self._sizes[-1] or not work.is_decode or (work.own_rows and not work.merged):
            return None
        with torch.inference_mode():
            return self._replay(work, token_ids)

    def _replay(self, work: StepWork, token_ids: torch.Tensor) -> torch.Tensor | None:
        num_rows, buffers = len(work.chunks), self._buffers
        plan = self._segments(work)
        bucket, replay = self._find_merged(num_rows, plan) if work.merged else self._find(num_rows, plan)
        if replay is None or (plan.segments and not work.merged and not bucket.adapters.set(plan)):
            return None
        if bucket.attention is not None and not bucket.attention.set(work.spans()):
            return None
        if bucket.states is not None and not bucket.states.set(work):
            return None
        positions = host_tensor(work.starts(), self._ops.device)
        buffers.positions[:num_rows].copy_(positions, non_blocking=True)
        buffers.token_ids[:num_rows].copy_(token_ids, non_blocking=True)
        replay()
        if self._ops.states is not None:
            self._ops.states.pool.copy((c.slot, saved) for c in work.chunks for _, saved in c.saves)
        return buffers.logits[:num_rows]

    def _segments(self, work: StepWork) -> SegmentPlan:
        """The step's segments; decodes repeat theirs for many steps, so the last are kept."""
        runs = work.runs
        if runs != self._runs:
            self._runs, self._plan = runs, plan_rows(runs)
        return self._plan

    def _find(self, num_rows: int, plan: SegmentPlan) -> tuple[_Bucket, Replay | None]:
        """The smallest bucket that has a graph for a step, and that graph; None where no bucket has."""
        index = bisect_left(self._sizes, num_rows)
        fitting = self._buckets[index]
        if not plan.segments:
            return fitting, fitting.without_adapters
        assert not self._model.has_own_rows(plan), "own rows in a step that is said to have none"
        key = self._ops.lora.graph_key(plan)
        for bucket in self._buckets[index:]:
            if key in bucket.with_adapters:
                return bucket, bucket.with_adapters[key]
        if key not in self._unknown_keys:
            self._unknown_keys.add(key)
            log.info("steps whose adapters need kernels %r run without graphs: none was captured for them", key)
        return fitting, None

    def _find_merged(self, num_rows: int, plan: SegmentPlan) -> tuple[_Bucket, Replay | None]:
        """The same for a step that a merged form has to itself; captured, if it has not been yet."""
        bucket = self._buckets[bisect_left(self._sizes, num_rows)]
        form = self._model.merged_form(plan)
        if form is None:
            return bucket, None
        graphs = self._merged.setdefault(form, {})
        if bucket.num_rows not in graphs:
            graphs[bucket.num_rows] = self._capture_merged(bucket, plan.segments[0].terms)
        return bucket, graphs[bucket.num_rows]

    def _capture_merged(self, bucket: _Bucket, terms: tuple[Term, ...]) -> Replay | None:
        """None: it cannot be captured, and its steps are launched kernel by kernel."""
        bucket.pad()
        adapters = self._ops.lora.prepare(plan_rows([(bucket.num_rows, terms)]))
        try:
            return self._capture_step(replace(bucket.forward, adapters=adapters), "of a merged adapter")
        except (InternalError, OverCapacity) as error:
            if isinstance(error, OverCapacity) and self._model.num_ranks > 1:
                raise  # the others have captured it
            log.warning("merged adapters run without graphs in batches of %d: %s", bucket.num_rows, error)
            return None

    def _capture_all(self, progress: Progress) -> tuple[_Bucket, ...]:
        start, done = time.monotonic(), 0
        keys = [self._keys(num_rows) for num_rows in self._sizes]
        total = len(self._sizes) + sum(map(len, keys))
        buckets: list[_Bucket] = []
        for num_rows, some in zip(reversed(self._sizes), reversed(keys), strict=True):
            progress(done, total)
            buckets.append(self._capture_bucket(num_rows, some))
            done += 1 + len(some)
        progress(total, total)
        log.info(
            "captured %d decode graphs, batch sizes %s, in %.1f s: %d bytes",
            total,
            ", ".join(map(str, self._sizes)),
            time.monotonic() - start,
            self._capture.nbytes,
        )
        return tuple(reversed(buckets))

    def _keys(self, num_rows: int) -> Sequence[Hashable]:
        """What a bucket has graphs with adapters for: all that can be captured where it is twice the last of these, or
        the largest; else that of most steps alone."""
        plan = self._ops.lora.static_plan(1, 1)
        assert plan is not None
        return plan.keys if num_rows == self._sizes[-1] or num_rows.bit_count() == 1 else plan.keys[:1]

    def _capture_bucket(self, num_rows: int, keys: Sequence[Hashable]) -> _Bucket:
        ops, lora, attention = self._ops, self._ops.lora, None
        if ops.kv_cache is not None:
            attention = ops.attention.static_plan(ops.kv_cache, num_rows, self._max_pages)
            assert attention is not None
        states = None if ops.states is None else _static_states(ops.states, num_rows, ops.device)
        adapters = lora.static_plan(num_rows, max(_TERMS_PER_ROW * num_rows, _LEAST_TERMS))
        assert adapters is not None
        assert not self._model.has_own_rows(adapters.segments), "a capture after adapters were loaded"
        base_only = lora.prepare(SegmentPlan(num_rows, ()))
        forward = ForwardBatch(
            token_ids=self._buffers.token_ids[:num_rows],
            positions=self._buffers.positions[:num_rows],
            attention=attention,
            kv_cache=ops.kv_cache,
            adapters=base_only,
            states=None if states is None or ops.states is None else states.step(ops.states.pool),
        )
        without_adapters = self._capture_step(forward, "without adapters")
        with_adapters = {
            key: self._capture_step(replace(forward, adapters=adapters.capturing(key)), f"with adapters ({key})")
            for key in keys
        }
        return _Bucket(forward, attention, states, adapters, without_adapters, with_adapters)

    def _capture_step(self, forward: ForwardBatch, variant: str) -> Replay:
        """All rows are padding while this captures: cache and states stay as they are."""
        model, num_rows = self._model, len(forward.token_ids)
        logits = self._buffers.logits[:num_rows]

        def step() -> None:
            # into memory of our own: what a graph allocates is the next graph's to overwrite
            logits.copy_(model.head(model.forward(forward), forward.adapters))

        what = f"the decode graph of {num_rows} sequences {variant}"
        try:
            with taking_memory(f"capturing {what}"):
                return self._capture.capture(step)
        except (OverCapacity, GroupLost):
            raise
        except Exception as error:  # whatever a kernel's compiler, a library or the driver can raise
            raise InternalError(f"capturing {what} failed: {error} (--graphs off serves without graphs)") from error


def _static_states(ops: StateOps, num_rows: int, device: torch.device) -> _StaticStates:
    conv, ssd = ops.conv.static_plan(num_rows, device), ops.ssd.static_plan(num_rows, device)
    assert conv is not None
    assert ssd is not None
    return _StaticStates(conv, ssd)


def _buffers(max_num_seqs: int, model: BaseModel) -> _Buffers:
    device = model.device
    return _Buffers(
        token_ids=torch.zeros(max_num_seqs, dtype=torch.int64, device=device),
        positions=torch.zeros(max_num_seqs, dtype=torch.int64, device=device),
        logits=torch.zeros(max_num_seqs, model.vocab_size, dtype=torch.float32, device=device),
    )
