"""The attention op's contract, for every backend that runs here, against dense float64 attention per sequence."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from loraplex_kernels.attention import SequenceSpan
from loraplex_kernels.testing import worst_excess
from tests.ops.attention_subjects import (
    DTYPES,
    GEOMETRIES,
    LAYERS,
    NUM_PAGES,
    SCALE,
    Geometry,
    Story,
    Subject,
    World,
    dense,
    make_subject,
    matrix,
)


def make_world(subject: Subject, window: int | None = None) -> World:
    """A world of the subject's own geometry and dtype."""
    return World(subject, subject.geometry, subject.dtype, window)


def check(world: World, chunks: Sequence[tuple[Story, int]]) -> None:
    starts = [seq.done for seq, _ in chunks]
    for (seq, count), start, out in zip(chunks, starts, world.step(chunks), strict=True):
        assert out.dtype == world.dtype
        assert worst_excess(out, dense(seq, start, start + count, world.window), world.dtype) <= 1


@pytest.mark.parametrize(("attention", "dtype", "geometry", "window"), matrix((None, 1, 7)), indirect=["attention"])
def test_chunks_and_decodes_match_dense_attention(
    attention: Subject, dtype: torch.dtype, geometry: Geometry, window: int | None
) -> None:
    world = World(attention, geometry, dtype, window)
    first, second, third = (world.add(length) for length in (37, 22, 16))
    check(world, [(first, 16), (second, 3)])  # whole prompts, one to a page's border
    check(world, [(second, 1), (first, 15)])  # a decode beside a later chunk
    check(world, [(first, 1), (second, 1), (third, 1)])  # decodes, one of a one-token prompt
    check(world, [(first, 1), (third, 1), (second, 16)])
    check(world, [(first, 1), (second, 1), (third, 14)])


@pytest.mark.parametrize("window", [None, 280])
def test_one_long_context_beside_short_ones(attention: Subject, window: int | None) -> None:
    world = World(attention, attention.entry.lean, attention.dtype, window)
    long = world.add(attention.entry.context)
    short = [world.add(9 + index) for index in range(5)]
    check(world, [(seq, seq.q.shape[0] - 2) for seq in short])
    world.step([(long, long.q.shape[0] - 2)])
    for _ in range(2):
        check(world, [(short[0], 1), (long, 1), *((seq, 1) for seq in short[1:])])


@pytest.mark.parametrize("window", [None, 50])
def test_prompt_of_several_query_blocks(attention: Subject, window: int | None) -> None:
    world = World(attention, attention.entry.lean, attention.dtype, window)
    seq = world.add(attention.entry.prompt)
    check(world, [(seq, attention.entry.prompt // 2)])
    check(world, [(seq, attention.entry.prompt // 2 - 10)])


def test_layers_are_apart(attention: Subject) -> None:
    world = make_world(attention)
    seq = world.add(5)
    world.step([(seq, 4)], layer=0)
    world.step([(Story(seq.pages, seq.q, -seq.k, -seq.v), 4)], layer=1)
    (out,) = world.step([(seq, 1)], layer=0)
    assert worst_excess(out, dense(seq, 4, 5, None), world.dtype) <= 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreted kernel: overflow is the point
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -6e4])
def test_poisoned_sequences_reach_no_other(attention: Subject, value: float) -> None:
    results = []
    for poison in (False, True):
        world = make_world(attention)
        bad, good, other = world.add(40), world.add(40), world.add(40)
        if poison:
            for side in (bad.q, bad.k, bad.v):
                side.fill_(value)
        chunks = [
            [(bad, 20), (good, 17), (other, 33)],
            [(good, 1), (bad, 1), (other, 1)],
            [(bad, 1), (good, 9), (other, 5)],
        ]
        outs = [world.step(step) for step in chunks]
        results.append(
            [
                out
                for step, row in zip(chunks, outs, strict=True)
                for (seq, _), out in zip(step, row, strict=True)
                if seq is not bad
            ]
        )
    assert all(torch.equal(clean, poisoned) for clean, poisoned in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_poisoned_sequence_shows_it(attention: Subject) -> None:
    """Or nothing would ever end it."""
    for place in ("q", "k", "v"):
        world = make_world(attention)
        seq = world.add(12)
        getattr(seq, place)[7] = float("nan")
        chunk = torch.cat(world.step([(seq, 10)]))
        assert not torch.isfinite(chunk[7]).any()
        (decode,) = world.step([(seq, 1)])
        assert bool(torch.isfinite(decode).all()) == (place == "q")


def test_zeroed_pages_forget_their_last_owner(attention: Subject) -> None:
    world = make_world(attention)
    last = world.add(30)
    for side in (last.k, last.v):
        side.fill_(float("nan"))
    world.step([(last, 29)], layer=1)
    world.free.extend(reversed(last.pages))
    fresh = world.add(30)
    assert set(fresh.pages) == set(last.pages)
    check(world, [(fresh, 3)])
    check(world, [(fresh, 1)])


def test_same_twice_and_alone(attention: Subject) -> None:
    runs = []
    for alone in (False, False, True):
        world = make_world(attention)
        seqs = [world.add(25) for _ in range(4)]
        world.step([(seq, 20 + index) for index, seq in enumerate(seqs)])
        if alone:
            runs.append(torch.cat([world.step([(seq, 1)])[0] for seq in seqs]))
        else:
            runs.append(torch.cat(world.step([(seq, 1) for seq in seqs])))
    assert torch.equal(runs[0], runs[1])
    assert worst_excess(runs[2], runs[0], attention.dtype) <= 1


def test_no_tokens(attention: Subject) -> None:
    world = make_world(attention)
    plan = attention.backend.prepare([], world.cache)
    geometry = attention.geometry
    heads = geometry.kv_heads * geometry.group
    empty = [
        torch.empty(0, count, geometry.head_dim, dtype=attention.dtype, device=attention.device)
        for count in (heads, geometry.kv_heads, geometry.kv_heads)
    ]
    out = attention.backend.attend(*empty, layer=0, cache=world.cache, plan=plan, scale=SCALE, window=None)
    assert out.shape == (0, heads * geometry.head_dim)
    assert plan.num_tokens == 0


def test_page_bytes_are_the_caches(attention: Subject) -> None:
    geometry = attention.geometry
    each = attention.backend.page_bytes(
        num_layers=LAYERS,
        page_size=geometry.page_size,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        dtype=torch.bfloat16,
    )
    assert World(attention, geometry, torch.bfloat16).cache.nbytes == each * NUM_PAGES


@pytest.mark.parametrize(
    ("queries", "context", "pages", "message"),
    [
        (2, 1, [1], "sequence 0 of the step: 2 query rows of a context of 1"),
        (0, 4, [1], "0 query rows"),
        (1, 17, [1], "1 pages of 16 slots cannot hold a context of 17"),
        (1, 17, [1, NUM_PAGES], r"pages 1\.\.240, must lie in 1\.\.239"),
        (1, 17, [1, 0], r"pages 0\.\.1"),
    ],
)
def test_spans_are_checked(attention: Subject, queries: int, context: int, pages: list[int], message: str) -> None:
    world = World(attention, GEOMETRIES[0], attention.dtype)
    with pytest.raises(ValueError, match=message):
        attention.backend.prepare([SequenceSpan(queries, context, pages)], world.cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tolerances_can_fail(dtype: torch.dtype) -> None:
    """A key too few, a key too many and a flipped score, each made once: all are far outside what is allowed."""
    world = World(make_subject("reference"), GEOMETRIES[0], dtype)
    seq = world.add(12)
    right = dense(seq, 6, 12, None)
    short = dense(seq, 6, 12, 6)
    ahead = torch.cat([dense(seq, row + 1, row + 2, None) for row in range(5, 11)])
    ahead[:5] = torch.cat(
        [dense(Story([], seq.q.roll(1, 0), seq.k, seq.v), row + 1, row + 2, None) for row in range(6, 11)]
    )
    flipped = dense(Story([], -seq.q, seq.k, seq.v), 6, 12, None)
    for wrong in (short, ahead, flipped):
        assert worst_excess(wrong.to(dtype), right, dtype) > 10
