"""Static plans of the attention op: one recorded set of launches serves the decodes of any later step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from loraplex_kernels.attention import AttentionPlan, SequenceSpan
from loraplex_kernels.attention.paged_cache import PagedCache
from loraplex_kernels.attention.paged_plan import MAX_SPLITS, StaticPagedPlan
from loraplex_kernels.testing import worst_excess
from tests.ops.attention_subjects import SCALE, Story, Subject, World, dense, spans_of, subjects_named

CAPTURED = subjects_named("triton, interpreted", "triton", "varlen")
ROWS = 4
LAYER = 1


@dataclass
class Recorder:
    """Stands for a kernel: launches it, and keeps the launch with the very arguments it was given."""

    kernel: object
    launches: list[Callable[[], object]] = field(default_factory=list)

    def __getitem__(self, grid: object) -> Callable[..., object]:
        def launch(*args: object, **options: object) -> object:
            again = lambda: self.kernel[grid](*args, **options)  # type: ignore[index]  # noqa: E731
            self.launches.append(again)
            return again()

        return launch


def prefilled(attention: Subject, lengths: Sequence[int]) -> tuple[World, list[Story]]:
    """Sequences that have all but their last three tokens in the cache."""
    world = World(attention, attention.entry.lean, attention.dtype)
    seqs = [world.add(length) for length in lengths]
    for seq in seqs:
        if seq.q.shape[0] > 3:
            world.step([(seq, seq.q.shape[0] - 3)], layer=LAYER)
    return world, seqs


def max_pages(world: World, seqs: Sequence[Story]) -> int:
    return max(len(seq.pages) for seq in seqs)


def attended(world: World, plan: AttentionPlan, rows: Sequence[torch.Tensor], window: int | None) -> torch.Tensor:
    return world.backend.attend(*rows, layer=LAYER, cache=world.cache, plan=plan, scale=SCALE, window=window)


def next_rows(seqs: Sequence[Story]) -> list[tuple[Story, slice]]:
    return [(seq, slice(seq.done, seq.done + 1)) for seq in seqs]


def check_rows(world: World, out: torch.Tensor, parts: Sequence[tuple[Story, slice]], window: int | None) -> None:
    for row, (seq, rows) in zip(out.cpu(), parts, strict=False):
        assert worst_excess(row[None], dense(seq, rows.start, rows.stop, window), world.dtype) <= 1
        seq.done = rows.stop
    assert not out[len(parts) :].any()


def page_zero_is_zero(cache: object) -> bool:
    assert isinstance(cache, PagedCache)
    return not any(side[0].any() for side in (*cache.keys, *cache.values))


@pytest.mark.parametrize("attention", CAPTURED, indirect=True)
@pytest.mark.parametrize("window", [None, 12])
def test_other_sequences_than_at_first(attention: Subject, window: int | None) -> None:
    world, seqs = prefilled(attention, [30, 300, 7, 2, 18, 257])
    plan = world.backend.static_plan(world.cache, ROWS, max_pages(world, seqs))
    assert plan is not None
    assert plan.num_tokens == ROWS
    fresh = attended(world, plan, world.rows([], ROWS), window)
    assert not fresh.any()  # padding, though its rows of q, k and v are not numbers
    for chosen in ([0, 1], [2, 5, 3, 4], [1], [4, 5, 1]):
        parts = next_rows([seqs[index] for index in chosen])
        assert plan.set(spans_of(parts))
        check_rows(world, attended(world, plan, world.rows(parts, ROWS), window), parts, window)
    assert page_zero_is_zero(world.cache)


@pytest.mark.parametrize("attention", subjects_named("triton, interpreted"), indirect=True)
@pytest.mark.parametrize("window", [None, 12])
def test_recorded_launches_serve_other_sequences(
    attention: Subject, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplex_kernels.attention import triton as kernels

    recorders = {name: Recorder(getattr(kernels, name)) for name in ("_attend_kernel", "_combine_kernel")}
    world, seqs = prefilled(attention, [30, 300, 7, 2, 18, 257])
    plan = world.backend.static_plan(world.cache, ROWS, max_pages(world, seqs))
    assert plan is not None
    for name, recorder in recorders.items():
        monkeypatch.setattr(kernels, name, recorder)
    first = next_rows([seqs[0]])
    plan.set(spans_of(first))
    inputs = world.rows(first, ROWS)
    out = attended(world, plan, inputs, window)
    assert [len(recorder.launches) for recorder in recorders.values()] == [1, 1]
    check_rows(world, out, first, window)
    for chosen in ([2, 5, 3, 1], [1, 4], []):
        parts = next_rows([seqs[index] for index in chosen])
        assert plan.set(spans_of(parts))
        for fixed, new in zip(inputs, world.rows(parts, ROWS), strict=True):
            fixed.copy_(new)
        for recorder in recorders.values():
            recorder.launches[0]()
        check_rows(world, out, parts, window)
    assert page_zero_is_zero(world.cache)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", subjects_named("triton", "varlen"), indirect=True)
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_graph_replay_is_bit_equal_to_eager(attention: Subject, dtype: torch.dtype, window: int | None) -> None:
    worlds = []
    for _ in range(2):
        world = World(attention, attention.entry.lean, dtype)
        seqs = [world.add(length) for length in (30, 300, 7, 2, 18, 1400)]
        for seq in seqs:
            if seq.q.shape[0] > 3:
                world.step([(seq, seq.q.shape[0] - 3)], layer=LAYER)
        worlds.append((world, seqs, world.backend.static_plan(world.cache, ROWS, max_pages(world, seqs))))
    (world, seqs, plan), (eager, eager_seqs, eager_plan) = worlds
    assert plan is not None
    assert eager_plan is not None
    inputs = world.rows([], ROWS)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attended(world, plan, inputs, window)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    plan.set(spans_of(next_rows([seqs[0]])))
    with torch.cuda.graph(graph):
        out = attended(world, plan, inputs, window)
    for chosen in ([2, 5, 3, 1], [1, 4], [], [0, 5]):
        parts = next_rows([seqs[index] for index in chosen])
        plan.set(spans_of(parts))
        for fixed, new in zip(inputs, world.rows(parts, ROWS), strict=True):
            fixed.copy_(new)
        graph.replay()
        eager_parts = next_rows([eager_seqs[index] for index in chosen])
        eager_plan.set(spans_of(eager_parts))
        expected = attended(eager, eager_plan, eager.rows(eager_parts, ROWS), window)
        assert torch.equal(out, expected)
        check_rows(world, out, parts, window)
        for seq, rows in eager_parts:
            seq.done = rows.stop


@pytest.mark.parametrize("attention", CAPTURED, indirect=True)
def test_what_does_not_fit_changes_nothing(attention: Subject) -> None:
    world, seqs = prefilled(attention, [30, 9, 12, 20])
    plan = world.backend.static_plan(world.cache, 2, 2)
    assert plan is not None
    parts = next_rows(seqs[:2])
    assert plan.set(spans_of(parts))
    page = world.geometry.page_size
    some = spans_of(parts)[0]
    for refused in (
        spans_of(next_rows(seqs[:3])),  # more sequences
        [SequenceSpan(2, 4, seqs[2].pages)],  # no decode
        [SequenceSpan(1, 2 * page + 1, [1, 2, 3])],  # more pages
    ):
        assert not plan.set(refused)
    with pytest.raises(ValueError, match="pages 0"):
        plan.set([some, SequenceSpan(1, 1, [0])])
    assert plan.set([SequenceSpan(1, some.context_len, [*seqs[0].pages, 0, 0, 0])])  # what is not needed may be longer
    assert plan.set(spans_of(parts))
    check_rows(world, attended(world, plan, world.rows(parts), None), parts, None)


def test_capacity_is_enough_for_what_fits() -> None:
    """Every row at its longest context; and more partial results than the scratch memory has rows are refused."""
    cpu = torch.device("cpu")
    full = StaticPagedPlan(8, 2048, 4096, 16, cpu)
    assert full.set([SequenceSpan(1, 2048 * 16, range(1, 2049))] * 8)
    assert full.on_device(1).counts.partials == 8 * MAX_SPLITS
    many = StaticPagedPlan(128, 2048, 4096, 16, cpu)
    assert many.set([SequenceSpan(1, 1024 * 16, range(1, 1025))] * 128)
    assert not many.set([SequenceSpan(1, 2048 * 16, range(1, 2049))] * 128)
    short = StaticPagedPlan(4, 16, 4096, 16, cpu)
    assert short.on_device(1).counts.partials == 0
    assert short.set([SequenceSpan(1, 256, range(1, 17))] * 4)
