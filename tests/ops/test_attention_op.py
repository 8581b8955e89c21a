"""The attention op's contract, for every backend that runs here, against dense float64 attention per sequence."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from loraplex_kernels.attention import AttentionBackend, KVCache, SequenceSpan
from loraplex_kernels.backend import ATTENTION, choose_attention
from loraplex_kernels.testing import worst_excess

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_PAGES = 240
LAYERS = 2
SCALE = 0.3


@dataclass(frozen=True)
class Geometry:
    page_size: int
    kv_heads: int
    group: int
    head_dim: int


GEOMETRIES = [Geometry(16, 3, 3, 8), Geometry(1, 1, 1, 5), Geometry(4, 2, 1, 16), Geometry(5, 1, 4, 6)]


@dataclass
class Sequence:
    """One sequence with all its tokens made in advance, and how many of them the cache has."""

    pages: list[int]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    done: int = 0
    chunk: int = 1


@dataclass
class World:
    """A backend, its cache, and sequences on shuffled pages."""

    backend: AttentionBackend
    geometry: Geometry
    dtype: torch.dtype
    window: int | None = None
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        geometry = self.geometry
        self.cache: KVCache = self.backend.new_cache(
            num_layers=LAYERS,
            num_pages=NUM_PAGES,
            page_size=geometry.page_size,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            dtype=self.dtype,
            device=CPU,
        )
        self.free = list(range(1, NUM_PAGES))
        random.Random(3).shuffle(self.free)
        self.generator = torch.Generator().manual_seed(11)

    def add(self, length: int) -> Sequence:
        geometry = self.geometry
        pages = [self.free.pop() for _ in range(-(-length // geometry.page_size))]
        self.cache.zero_pages(pages)
        heads = (geometry.kv_heads * geometry.group, geometry.kv_heads, geometry.kv_heads)
        q, k, v = (
            torch.randn(length, count, geometry.head_dim, generator=self.generator).to(self.dtype) for count in heads
        )
        self.sequences.append(Sequence(pages, q, k, v))
        return self.sequences[-1]

    def step(self, chunks: list[tuple[Sequence, int]], layer: int = 1) -> list[torch.Tensor]:
        """Run ``count`` further tokens of each sequence; the rows of out per sequence."""
        parts = [(seq, slice(seq.done, seq.done + count)) for seq, count in chunks]
        spans = [SequenceSpan(rows.stop - rows.start, rows.stop, seq.pages) for seq, rows in parts]
        out = self.backend.attend(
            *(torch.cat([getattr(seq, name)[rows] for seq, rows in parts]) for name in "qkv"),
            layer=layer,
            cache=self.cache,
            plan=self.backend.prepare(spans, self.cache),
            scale=SCALE,
            window=self.window,
        )
        for seq, rows in parts:
            seq.done = rows.stop
        return list(out.split([count for _, count in chunks]))


def dense(seq: Sequence, start: int, stop: int, window: int | None) -> torch.Tensor:
    """Rows ``start:stop`` in float64 by torch's own attention over the whole context."""
    group = seq.q.shape[1] // seq.k.shape[1]
    q = seq.q[start:stop].double().transpose(0, 1)
    k, v = (side[:stop].double().transpose(0, 1).repeat_interleave(group, 0) for side in (seq.k, seq.v))
    query, key = torch.arange(start, stop)[:, None], torch.arange(stop)[None, :]
    seen = (key <= query) & (key > query - (window or stop))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=SCALE)
    return out.transpose(0, 1).flatten(1)


@pytest.fixture(params=sorted(ATTENTION))
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return choose_attention(request.param, CPU)


def check(world: World, chunks: list[tuple[Sequence, int]]) -> None:
    starts = [seq.done for seq, _ in chunks]
    for (seq, count), start, out in zip(chunks, starts, world.step(chunks), strict=True):
        assert out.dtype == world.dtype
        assert worst_excess(out, dense(seq, start, start + count, world.window), world.dtype) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_chunks_and_decodes_match_dense_attention(
    backend: AttentionBackend, geometry: Geometry, window: int | None, dtype: torch.dtype
) -> None:
    world = World(backend, geometry, dtype, window)
    first, second, third = (world.add(length) for length in (37, 22, 16))
    check(world, [(first, 16), (second, 3)])  # whole prompts, one to a page's border
    check(world, [(second, 1), (first, 15)])  # a decode beside a later chunk
    check(world, [(first, 1), (second, 1), (third, 1)])  # decodes, one of a one-token prompt
    check(world, [(first, 1), (third, 1), (second, 16)])
    check(world, [(first, 1), (second, 1), (third, 14)])


def test_one_long_context_beside_short_ones(backend: AttentionBackend) -> None:
    world = World(backend, Geometry(16, 1, 2, 4), torch.float32)
    long = world.add(2200)
    short = [world.add(9 + index) for index in range(5)]
    check(world, [(seq, seq.q.shape[0] - 2) for seq in short])
    world.step([(long, 2198)])
    for _ in range(2):
        check(world, [(short[0], 1), (long, 1), *((seq, 1) for seq in short[1:])])


def test_prompt_of_several_query_blocks(backend: AttentionBackend) -> None:
    for window in (None, 50):
        world = World(backend, Geometry(16, 1, 2, 4), torch.float32, window)
        seq = world.add(600)
        check(world, [(seq, 300)])
        check(world, [(seq, 290)])


def test_layers_are_apart(backend: AttentionBackend) -> None:
    world = World(backend, GEOMETRIES[0], torch.float32)
    seq = world.add(5)
    world.step([(seq, 4)], layer=0)
    seq.done = 0
    other = Sequence(seq.pages, seq.q, -seq.k, -seq.v)
    world.step([(other, 4)], layer=1)
    (out,) = world.step([(Sequence(seq.pages, seq.q, seq.k, seq.v, done=4), 1)], layer=0)
    assert worst_excess(out, dense(seq, 4, 5, None), torch.float32) <= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38])
def test_poisoned_sequences_reach_no_other(backend: AttentionBackend, value: float) -> None:
    results = []
    for poison in (False, True):
        world = World(backend, GEOMETRIES[0], torch.bfloat16)
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


def test_zeroed_pages_forget_their_last_owner(backend: AttentionBackend) -> None:
    world = World(backend, GEOMETRIES[0], torch.float32)
    last = world.add(30)
    for side in (last.k, last.v):
        side.fill_(float("nan"))
    world.step([(last, 29)], layer=1)
    world.free.extend(reversed(last.pages))
    fresh = world.add(30)
    assert set(fresh.pages) == set(last.pages)
    check(world, [(fresh, 3)])
    check(world, [(fresh, 1)])


def test_same_twice_and_alone(backend: AttentionBackend) -> None:
    runs = []
    for alone in (False, False, True):
        world = World(backend, GEOMETRIES[0], torch.float32)
        seqs = [world.add(25) for _ in range(4)]
        world.step([(seq, 20 + index) for index, seq in enumerate(seqs)])
        if alone:
            runs.append(torch.cat([world.step([(seq, 1)])[0] for seq in seqs]))
        else:
            runs.append(torch.cat(world.step([(seq, 1) for seq in seqs])))
    assert torch.equal(runs[0], runs[1])
    assert worst_excess(runs[2], runs[0], torch.float32) <= 1


def test_no_tokens(backend: AttentionBackend) -> None:
    world = World(backend, GEOMETRIES[0], torch.float32)
    plan = backend.prepare([], world.cache)
    empty = [torch.empty(0, heads, 8) for heads in (9, 3, 3)]
    out = backend.attend(*empty, layer=0, cache=world.cache, plan=plan, scale=SCALE, window=None)
    assert out.shape == (0, 72)
    assert plan.num_tokens == 0


def test_page_bytes_are_the_caches(backend: AttentionBackend) -> None:
    cache = World(backend, GEOMETRIES[0], torch.bfloat16).cache
    each = backend.page_bytes(num_layers=LAYERS, page_size=16, kv_heads=3, head_dim=8, dtype=torch.bfloat16)
    assert cache.nbytes == each * NUM_PAGES


@pytest.mark.parametrize(
    ("span", "message"),
    [
        (SequenceSpan(2, 1, [1]), "sequence 0 of the step: 2 query rows of a context of 1"),
        (SequenceSpan(0, 4, [1]), "0 query rows"),
        (SequenceSpan(1, 17, [1]), "1 pages of 16 slots cannot hold a context of 17"),
        (SequenceSpan(1, 17, [1, NUM_PAGES]), r"pages 1\.\.240, must lie in 1\.\.239"),
        (SequenceSpan(1, 17, [1, 0]), r"pages 0\.\.1"),
    ],
)
def test_spans_are_checked(backend: AttentionBackend, span: SequenceSpan, message: str) -> None:
    world = World(backend, GEOMETRIES[0], torch.float32)
    with pytest.raises(ValueError, match=message):
        backend.prepare([span], world.cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tolerances_can_fail(dtype: torch.dtype) -> None:
    """A key too few, a key too many and a flipped score, each made once: all are far outside what is allowed."""
    world = World(choose_attention("reference", CPU), GEOMETRIES[0], dtype)
    seq = world.add(12)
    right = dense(seq, 6, 12, None)
    short = dense(seq, 6, 12, 6)
    ahead = torch.cat([dense(seq, row + 1, row + 2, None) for row in range(5, 11)])
    ahead[:5] = torch.cat(
        [dense(Sequence([], seq.q.roll(1, 0), seq.k, seq.v), row + 1, row + 2, None) for row in range(6, 11)]
    )
    flipped = dense(Sequence([], -seq.q, seq.k, seq.v), 6, 12, None)
    for wrong in (short, ahead, flipped):
        assert worst_excess(wrong.to(dtype), right, dtype) > 10
