"""What the CUDA backends promise beyond the op's contract: splits, windows, poison, neighbours, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from loraplex_kernels.attention import SequenceSpan
from loraplex_kernels.attention.paged_cache import PagedCache
from loraplex_kernels.attention.paged_plan import MAX_CHUNK_PAIRS, MAX_SPLITS, SPLIT_KEYS, pack, span_table
from loraplex_kernels.testing import worst_excess
from tests.ops.attention_subjects import SCALE, Story, Subject, World, dense, spans_of, subjects_named

PAGED = subjects_named("triton, interpreted", "triton", "varlen")
TRITON = subjects_named("triton, interpreted", "triton")


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """torch.empty holds NaN."""
    torch.use_deterministic_algorithms(True)  # fills what is not initialized, by default
    yield
    torch.use_deterministic_algorithms(False)


def lean(attention: Subject, window: int | None = None) -> World:
    return World(attention, attention.entry.lean, attention.dtype, window)


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("attention", PAGED, indirect=True)
@pytest.mark.parametrize("window", [None, 1, 44, 45, 300, 301])
def test_windows_across_splits_and_pages(attention: Subject, window: int | None) -> None:
    """A context of 300: with a window of 44 the lowest key is the first of the second split."""
    world = lean(attention, window)
    seq, other = world.add(300), world.add(270)
    world.fill(seq, 275)
    world.fill(other, 100)
    steps = ([(seq, 24), (other, 2)], [(seq, 1), (other, 1)], [(other, 160)])
    for chunks in steps:
        starts = [story.done for story, _ in chunks]
        for (story, count), start, out in zip(chunks, starts, world.step(chunks), strict=True):
            assert worst_excess(out, dense(story, start, start + count, window), world.dtype) <= 1


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("attention", PAGED, indirect=True)
@pytest.mark.parametrize("window", [None, 20])
def test_what_pages_hold_elsewhere_changes_no_bit(attention: Subject, window: int | None) -> None:
    """Slots past the context, page 0, pages of nobody and of a sequence that is not in the step: all not a number."""
    results = []
    for poison in (False, True):
        world = lean(attention, window)
        long, short, absent = world.add(300), world.add(40), world.add(40)
        world.fill(long, 290)
        world.step([(short, 21), (absent, 33)])
        if poison:
            fill_all_but(world, [long, short], float("nan"))
        outs = [*world.step([(long, 1), (short, 1)]), *world.step([(short, 1), (long, 6)])]
        results.append(torch.cat(outs))
    assert torch.equal(*results)


def fill_all_but(world: World, kept: list[Story], value: float) -> None:
    """Every slot that holds no key or value of ``kept``."""
    assert isinstance(world.cache, PagedCache)
    size = world.geometry.page_size
    free = torch.ones(world.num_pages, size, dtype=torch.bool)
    for seq in kept:
        for position in range(seq.done):
            free[seq.pages[position // size], position % size] = False
    mask = free[:, None, :, None].to(world.subject.device)
    for side in (*world.cache.keys, *world.cache.values):
        side.masked_fill_(mask, value)


@pytest.mark.parametrize("attention", TRITON, indirect=True)
def test_decodes_have_the_same_bits_alone_and_in_any_company(attention: Subject) -> None:
    outs = []
    for company in ([0], [0, 1], [2, 1, 0], [1, 0, 2]):
        world = lean(attention)
        seqs = [world.add(300), world.add(41), world.add(18)]
        for seq in seqs:
            world.fill(seq, seq.q.shape[0] - 1)
        parts = world.step([(seqs[index], 1) for index in company])
        outs.append(parts[company.index(0)])
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("attention", PAGED, indirect=True)
def test_what_the_kernels_cannot_take_is_refused(attention: Subject) -> None:
    world = lean(attention)
    seq = world.add(5)
    geometry = world.geometry
    parts = [(seq, slice(0, 5))]
    plan = world.backend.prepare(spans_of(parts), world.cache)
    q, k, v = world.rows(parts)
    heads = f"{geometry.kv_heads * geometry.group}"
    wide = torch.zeros(5, q.shape[1] + 1, geometry.head_dim, dtype=q.dtype, device=q.device)
    spread = torch.zeros(5, geometry.head_dim, q.shape[1], dtype=q.dtype, device=q.device).transpose(1, 2)
    meta = torch.zeros(k.shape, dtype=k.dtype, device="meta")
    cases = [
        ((q[:4], k, v), rf"q is \(4, {heads}, {geometry.head_dim}\), must be \[5, heads"),
        ((q.flatten(1), k, v), "q is"),
        ((q, k[:, :, :-1], v), "k is"),
        ((q, k, v[:4]), "v is"),
        ((q.double(), k, v), "q is torch.float64 on"),
        ((q, meta, v), "k is .* on meta; the cache is"),
        ((spread, k, v), "must lie side by side"),
    ]
    if geometry.kv_heads > 1:
        cases.append(((wide, k, v), "with heads a multiple"))
    for (bad_q, bad_k, bad_v), message in cases:
        with pytest.raises(ValueError, match=message):
            world.backend.attend(bad_q, bad_k, bad_v, layer=0, cache=world.cache, plan=plan, scale=SCALE, window=None)
    for scale, window, message in ((0.0, None, r"scale 0\.0"), (float("nan"), None, "scale"), (1.0, 0, "window 0")):
        with pytest.raises(ValueError, match=message):
            world.backend.attend(q, k, v, layer=0, cache=world.cache, plan=plan, scale=scale, window=window)


@pytest.mark.parametrize("attention", TRITON, indirect=True)
def test_rows_and_heads_may_lie_apart(attention: Subject) -> None:
    world = lean(attention)
    seq = world.add(20)
    (expected,) = world.step([(seq, 19)])
    seq.done = 0
    parts = [(seq, slice(0, 19))]
    q, k, v = (torch.zeros(38, 2 * side.shape[1], side.shape[2] + 3, dtype=side.dtype) for side in world.rows(parts))
    spread = [side[::2, ::2, 3:].to(attention.device) for side in (q, k, v)]
    for side, rows in zip(spread, world.rows(parts), strict=True):
        side.copy_(rows)
    out = world.backend.attend(
        *spread,
        layer=1,
        cache=world.cache,
        plan=world.backend.prepare(spans_of(parts), world.cache),
        scale=SCALE,
        window=None,
    )
    assert torch.equal(out.cpu(), expected)


def test_splits_stay_within_their_bounds() -> None:
    """Whatever the context and the chunk: no more pairs than the scratch memory is meant for, all keys covered."""
    for queries in (1, 2, 3, 16, 100, 255, 256, 257, 4000):
        for context in (queries, queries + 255, queries + 256, 40_000, 131_072, 1_000_000):
            context = max(context, queries)
            pages = range(1, -(-context // 16) + 1)
            table = span_table([SequenceSpan(queries, context, pages)], num_pages=70_000, page_size=16)
            packed = pack(table, page_size=16, tile_queries=32)
            allowed = MAX_SPLITS if queries == 1 else max(MAX_CHUNK_PAIRS, queries)
            assert packed.counts.partials <= allowed
            assert packed.counts.decode_items + packed.counts.chunk_items >= 1
            assert packed.array.max() < 2**31
    assert SPLIT_KEYS % 64 == 0  # a tile of keys lies in one split


@pytest.mark.parametrize("attention", TRITON, indirect=True)
def test_pages_are_cleared_in_runs(attention: Subject) -> None:
    world = replace(lean(attention), num_pages=9)
    assert isinstance(world.cache, PagedCache)
    for side in (*world.cache.keys, *world.cache.values):
        side.fill_(1)
    world.cache.zero_pages([7, 2, 3, 4])
    world.cache.zero_pages([])
    for side in (*world.cache.keys, *world.cache.values):
        assert [bool(page.any()) for page in side] == [True, True, False, False, False, True, True, False, True]
