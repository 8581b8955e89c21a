"""The attention op at one model's heads: backends beside torch's own attention, one by one and padded to a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from bench.ops.attention_formulations import FORMULATIONS
from bench.ops.options import Options
from bench.ops.report import Report, Row, report
from bench.ops.sequences import Sequences
from bench.ops.shapes import AttentionStep
from bench.ops.timing import Stopwatch, Way, WrongResult, measure, num_sets, stopwatch_for
from loraplex_kernels.attention import AttentionBackend, AttentionPlan, KVCache, SequenceSpan
from loraplex_kernels.backend import choose_attention
from loraplex_kernels.testing import worst_excess

PAGE_SIZE = 16
#: rows written at a time when a cache is filled
FILL_ROWS = 256


@dataclass(frozen=True, slots=True)
class Filled:
    """A backend with every context in its cache and the step's plan: for decodes a static one, where it has them."""

    backend: AttentionBackend
    cache: KVCache
    spans: tuple[SequenceSpan, ...]
    plan: AttentionPlan
    capturable: bool

    def attend(self, sequences: Sequences) -> torch.Tensor:
        """[T, heads * head_dim]"""
        q, k, v = sequences.q, sequences.new_keys, sequences.new_values
        return self.backend.attend(
            q, k, v, layer=0, cache=self.cache, plan=self.plan, scale=sequences.scale, window=None
        )

    def prepare(self) -> AttentionPlan:
        """The step's plan once more."""
        return self.backend.prepare(self.spans, self.cache)


def run(options: Options, stopwatch: Stopwatch | None = None) -> Report:
    """Time every step, one layer of it. Raises WrongResult before it reports the time of a wrong way.

    ``prepare`` of each backend, once a step for all layers, is timed on its own. Raises ValueError for a backend that
    cannot run on the device.
    """
    stopwatch = stopwatch or stopwatch_for(options.device)
    names = dict.fromkeys(choose_attention(name, options.device, dtype=options.dtype).name for name in options.backends)
    rows = []
    for step in options.shapes.attention_steps:
        sequences = _sequences(options, step)
        expected = _filled("reference", sequences).attend(sequences)
        sets = [sequences, *(sequences.copied() for _ in range(num_sets(stopwatch, sequences.num_bytes) - 1))]
        ways = []
        for name in names:
            filled = [_filled(name, copied) for copied in sets]
            attends = (partial(one.attend, copied) for one, copied in zip(filled, sets, strict=True))
            capturable = all(one.capturable for one in filled)
            ways.append(Way(name, _checked(attends, f"{name}, {step.name}", expected), capturable))
            ways.append(Way(f"{name}: prepare", (filled[0].prepare,)))
        for name, make in FORMULATIONS.items():
            made = (make(copied) for copied in sets)
            ways.append(Way(name, _checked(made, f"{name}, {step.name}", expected), capturable=True))
        timings = measure(ways, stopwatch, repeats=options.repeats, calls=options.calls)
        rows.append(Row(step.name, "", sequences.num_bytes, len(sets), timings))
    return report("attention", options, stopwatch.copy_bytes_per_s(), tuple(rows))


def _sequences(options: Options, step: AttentionStep) -> Sequences:
    model = options.shapes.model
    generator = torch.Generator().manual_seed(2)

    def drawn(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, model.head_dim, generator=generator).to(options.device, options.dtype)

    contexts = [context for _, context in step.sequences]
    return Sequences(
        counts=step.sequences,
        q=drawn(sum(queries for queries, _ in step.sequences), model.num_heads),
        keys=tuple(drawn(context, model.num_kv_heads) for context in contexts),
        values=tuple(drawn(context, model.num_kv_heads) for context in contexts),
    )


def _checked(
    calls: Iterable[Callable[[], torch.Tensor]], where: str, expected: torch.Tensor
) -> tuple[Callable[[], torch.Tensor], ...]:
    """The calls. Raises WrongResult when one is not what the reference computes."""
    kept = tuple(calls)
    for call in kept:
        excess = worst_excess(call(), expected, expected.dtype)
        if excess > 1:
            raise WrongResult(f"{where}: {excess:.2f} times the tolerance away from the reference")
    return kept


def _filled(name: str, sequences: Sequences) -> Filled:
    """A cache of one layer that holds every context, in pages that lie anywhere."""
    backend = choose_attention(name, sequences.q.device, dtype=sequences.q.dtype)
    spans = _spans(sequences.counts)
    _, kv_heads, head_dim = sequences.keys[0].shape
    cache = backend.new_cache(
        num_layers=1,
        num_pages=1 + sum(len(span.pages) for span in spans),
        page_size=PAGE_SIZE,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=sequences.q.dtype,
        device=sequences.q.device,
    )
    for span, keys, values in zip(spans, sequences.keys, sequences.values, strict=True):
        # a backend writes a cache only as it attends; a window of one row makes that cheap
        for start in range(0, span.context_len, FILL_ROWS):
            k, v = keys[start : start + FILL_ROWS], values[start : start + FILL_ROWS]
            plan = backend.prepare([replace(span, num_queries=len(k), context_len=start + len(k))], cache)
            q = k.repeat_interleave(sequences.group, 1)
            backend.attend(q, k, v, layer=0, cache=cache, plan=plan, scale=sequences.scale, window=1)
    static = None
    if all(span.num_queries == 1 for span in spans):
        static = backend.static_plan(cache, len(spans), max(len(span.pages) for span in spans))
    if static is not None and static.set(spans):
        return Filled(backend, cache, spans, static, capturable=True)
    return Filled(backend, cache, spans, backend.prepare(spans, cache), capturable=False)


def _spans(counts: Sequence[tuple[int, int]]) -> tuple[SequenceSpan, ...]:
    total = sum(-(-context // PAGE_SIZE) for _, context in counts)
    free = (torch.randperm(total, generator=torch.Generator().manual_seed(1)) + 1).tolist()
    return tuple(
        SequenceSpan(queries, context, [free.pop() for _ in range(-(-context // PAGE_SIZE))])
        for queries, context in counts
    )
