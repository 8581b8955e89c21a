"""Decode under captured graphs: what is replayed is what an eager step computes, whatever changed since the capture."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from loraplex.engine.batch import Ops, host_tensor, pack
from loraplex.engine.graphs import DecodeGraphs, GraphLimits, bucket_sizes, why_not
from loraplex.engine.sequence import Batch, Chunk, Origin, Sequence
from loraplex.engine.uses import Uses
from loraplex.engine.warm_up import warm_up
from loraplex.engine.work import work_of
from loraplex.errors import GroupLost, InternalError, OverCapacity
from loraplex.models.base import BaseModel
from loraplex.types import Request
from loraplex_kernels.attention.reference import ReferenceAttention, ReferenceCache
from loraplex_kernels.lora import PartDelta, SlotDelta
from loraplex_kernels.lora.reference import ReferenceLora
from loraplex_kernels.segments import Term
from loraplex_kernels.testing import random_factors, random_scale
from tests.fakes_graphs import TapeAttention, TapeCapture, TapeLora
from tests.tiny import load_tiny, prompt, tiny_checkpoint

PAGE_SIZE = 4
NUM_PAGES = 80
MAX_LEN = 40
MAX_SEQS = 10


#: for tests of what attention sees: also with a window
with_a_window = pytest.mark.parametrize("checkpoint", ["llama", "mistral"], indirect=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, root: Path) -> Path:
    arch = getattr(request, "param", "llama")
    window = {"sliding_window": 7} if arch == "mistral" else {}
    return tiny_checkpoint(root, arch, tie_word_embeddings=False, **window)


@dataclass
class World:
    """One model over two caches: each step runs under graphs on one and eagerly on the other."""

    model: BaseModel
    lora: TapeLora
    ops: Ops
    eager: Ops
    capture: TapeCapture
    graphs: DecodeGraphs
    sequences: list[Sequence] = field(default_factory=list)
    next_page: int = 1

    def load(self, slot: int, *, rank: int, seed: int, scaled: bool = False) -> None:
        """Random factors at every site, in the place of what the slot held; ``scaled``: also inputs and outputs of
        every other table."""
        generator = torch.Generator().manual_seed(seed)
        scales = False
        for table in {id(ref.table): ref.table for ref in self.model.tables().values() if ref.table}.values():
            pairs = [random_factors(rank, table.in_features, size, generator) for size in table.part_sizes]
            scales = scaled and not scales
            out = [random_scale(size, generator) if scales else None for size in table.part_sizes]
            parts = tuple(PartDelta(pair, scale) for pair, scale in zip(pairs, out, strict=True))
            in_scale = random_scale(table.in_features, generator) if scales else None
            table.write(slot, table.pack(SlotDelta(parts, in_scale)))

    def unload(self, slot: int) -> None:
        for ref in self.model.tables().values():
            ref.rows.clear(slot)
            if ref.table is not None:
                ref.table.clear(slot)

    def start(self, *terms: Term, num_tokens: int = 5) -> Sequence:
        """A new sequence, its prompt computed on both caches."""
        index = len(self.sequences)
        sequence = Sequence(Origin(b"", index), Request(f"r{index}", prompt(num_tokens, seed=index)), Uses(), 0, 0.0)
        sequence.terms = terms
        num_pages = -(-MAX_LEN // PAGE_SIZE)
        sequence.pages = list(range(self.next_page, self.next_page + num_pages))
        self.next_page += num_pages
        self.sequences.append(sequence)
        batch = Batch([Chunk(sequence, 0, num_tokens, sample=True)])
        for ops in (self.ops, self.eager):
            logits = self.run_eagerly(batch, ops)
        draw(sequence, int(logits[0].argmax()))
        return sequence

    def run_eagerly(self, batch: Batch, ops: Ops) -> torch.Tensor:
        with torch.inference_mode():
            packed = pack(work_of(batch), ops)
            hidden = self.model.forward(packed.forward)
            return self.model.head(hidden[packed.sampled.rows], packed.sampled.adapters)

    def decode(self, sequences: Seq[Sequence]) -> None:
        """One step on both sides; they must agree, and the graph must have served it."""
        batch = decode_batch(sequences)
        work = work_of(batch)
        replayed = self.capture.replayed
        got = self.graphs.run(work, host_tensor(work.token_ids, self.ops.device))
        expected = self.run_eagerly(batch, self.eager)
        assert got is not None
        assert self.capture.replayed == replayed + 1
        assert got.dtype is torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert got.argmax(-1).tolist() == expected.argmax(-1).tolist()
        for chunk, token in zip(batch.chunks, expected.argmax(-1).tolist(), strict=True):
            draw(chunk.sequence, token)


def draw(sequence: Sequence, token: int) -> None:
    """What a step and its end do to a sequence."""
    sequence.num_unknown += 1
    sequence.append(token)


def decode_batch(sequences: Seq[Sequence]) -> Batch:
    """As the scheduler orders rows: by terms."""
    ordered = sorted(sequences, key=lambda s: [(term.slot, term.weight) for term in s.terms])
    return Batch([Chunk(s, s.num_tokens - 1, 1, sample=True) for s in ordered])


def world_of(checkpoint: Path, limits: GraphLimits, on_replay: Callable[[int], None] = lambda _: None) -> World:
    """``on_replay`` is told how many rows each replayed graph has."""
    lora, attention = TapeLora(), TapeAttention()
    model = load_tiny(checkpoint, lora=lora, attention=attention)
    ops, eager = (Ops(lora, attention, new_cache(model, attention), model.device) for _ in range(2))
    capture = TapeCapture(on_replay)
    graphs = DecodeGraphs(model, ops, limits, capture, lambda done, total: None)
    return World(model, lora, ops, eager, capture, graphs)


@pytest.fixture
def world(checkpoint: Path) -> World:
    return world_of(checkpoint, GraphLimits(MAX_SEQS, MAX_LEN))


def new_cache(model: BaseModel, attention: ReferenceAttention) -> ReferenceCache:
    kv = model.kv_spec()
    cache = attention.new_cache(
        num_layers=kv.num_layers,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        kv_heads=kv.kv_heads,
        head_dim=kv.head_dim,
        dtype=model.dtype,
        device=model.device,
    )
    assert isinstance(cache, ReferenceCache)
    return cache


@with_a_window
def test_replays_are_eager_steps_whatever_was_loaded_since(world: World) -> None:
    """No adapter was there at capture; loads, unloads and replacements happen between replays."""
    world.load(0, rank=3, seed=0)
    world.load(5, rank=16, seed=1)
    base, mine, mixed = world.start(), world.start(Term(5)), world.start(Term(0, 0.5), Term(5, -2.0), num_tokens=9)
    world.decode([base])  # bucket 1
    world.decode([mine])
    world.decode([base, mine, mixed])  # bucket 4: a row of padding
    world.load(5, rank=1, seed=2)
    world.decode([base, mine, mixed])
    world.load(9, rank=7, seed=3)
    late = [world.start(Term(9)), world.start(Term(9))]
    world.decode([base, mine, mixed, *late])  # bucket 8
    world.unload(5)
    world.unload(9)
    world.decode([base])
    world.load(9, rank=2, seed=4)
    world.decode([late[0], base, late[1]])
    assert len({tuple(s.token_ids[-3:]) for s in world.sequences}) > 1


def test_base_only_steps_replay_the_graph_without_adapter_nodes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.load(0, rank=3, seed=0)
    sequences = [world.start() for _ in range(3)]
    sets: list[object] = []
    bucket_plan = type(world.lora.static_plan(1, 1))
    original = bucket_plan.set
    monkeypatch.setattr(bucket_plan, "set", lambda self, plan: sets.append(plan) or original(self, plan))
    world.decode(sequences)
    assert not sets
    world.decode([*sequences, world.start(Term(0))])
    assert len(sets) == 1


def test_adapters_that_scale_inputs_replay_graphs_that_do(world: World) -> None:
    """Alone and among others, whatever is loaded since; an adapter that no longer does, or never did, leaves them."""
    world.load(0, rank=3, seed=0)
    world.load(1, rank=2, seed=1, scaled=True)
    base, plain, scaled = world.start(), world.start(Term(0)), world.start(Term(1))
    mixed = world.start(Term(0, 0.5), Term(1, -0.5), num_tokens=9)
    world.decode([scaled])
    world.decode([base, plain, scaled, mixed])
    more = [world.start(Term(1)), world.start()]
    world.decode([base, plain, scaled, mixed, more[0]])
    world.load(1, rank=4, seed=2, scaled=True)
    world.decode([scaled, base, *more])
    world.load(1, rank=4, seed=3)  # no longer
    world.decode([scaled, base, *more])


@pytest.mark.parametrize(
    ("max_num_seqs", "count", "served_by"), [(26, 17, 26), (26, 16, 16), (50, 17, 32), (50, 33, 50), (50, 50, 50)]
)
def test_few_buckets_have_graphs_that_scale_inputs(
    checkpoint: Path, max_num_seqs: int, count: int, served_by: int
) -> None:
    """Each is twice the last: a step of one more row than fits runs in the next, and gives the same logits."""
    captured: list[int] = []
    world = world_of(checkpoint, GraphLimits(max_num_seqs, MAX_LEN), on_replay=captured.append)
    world.load(0, rank=3, seed=0)
    world.load(1, rank=3, seed=1, scaled=True)
    for term, size in ((Term(1), served_by), (Term(0), min(s for s in world.graphs.sizes if s >= count))):
        sequence = world.start(term)
        work = work_of(decode_batch([sequence] * count))
        logits = world.graphs.run(work, host_tensor(work.token_ids, world.ops.device))
        assert captured.pop() == size
        assert not captured
        assert logits is not None
        expected = world.run_eagerly(decode_batch([sequence]), world.eager)
        torch.testing.assert_close(logits, expected.expand(count, -1), rtol=1e-4, atol=1e-4)


@with_a_window
def test_padding_rows_write_nothing_to_the_cache(world: World) -> None:
    world.load(0, rank=3, seed=0)
    sequences = [world.start(Term(0)) for _ in range(5)]
    cache = world.ops.kv_cache
    assert isinstance(cache, ReferenceCache)
    world.decode(sequences)  # 3 rows of padding, whose inputs are those of no step
    world.decode(sequences[:3])  # 1 row of padding, whose inputs are an earlier step's
    before = cache.pages.clone()
    world.decode(sequences[:3])
    changed = (cache.pages != before).flatten(3).any(-1).any(0).any(0).nonzero().flatten().tolist()
    written = {s.pages[(s.num_tokens - 2) // PAGE_SIZE] for s in sequences[:3]}
    assert set(changed) == written
    assert not cache.pages[:, :, 0].any()


@with_a_window
def test_capturing_leaves_the_cache_as_it_was(world: World) -> None:
    cache = world.ops.kv_cache
    assert isinstance(cache, ReferenceCache)
    assert not cache.pages.any()


@with_a_window
def test_a_non_finite_neighbour_stays_alone(world: World) -> None:
    """Also as padding: what a row held in an earlier step is padding's input now."""
    world.load(0, rank=3, seed=0)
    sequences = [world.start(Term(0)) for _ in range(3)]
    poisoned = world.start()
    cache = world.ops.kv_cache
    assert isinstance(cache, ReferenceCache)
    cache.pages[:, :, poisoned.pages[0]] = float("nan")
    batch = decode_batch([*sequences, poisoned])
    work = work_of(batch)
    logits = world.graphs.run(work, host_tensor(work.token_ids, world.ops.device))
    assert logits is not None
    assert logits.isfinite().all(-1).tolist() == [c.sequence is not poisoned for c in batch.chunks]
    world.decode(sequences)


def test_what_graphs_do_not_serve(world: World) -> None:
    world.load(0, rank=3, seed=0)
    world.load(1, rank=3, seed=1)
    decodes = [world.start(Term(0)) for _ in range(2)]
    first = decodes[0]
    replayed = world.capture.replayed

    def served(batch: Batch) -> bool:
        ids = torch.zeros(batch.num_tokens, dtype=torch.int64)
        return world.graphs.run(work_of(batch), ids) is not None

    assert not served(Batch([Chunk(first, 0, 3, sample=False)]))  # a prefill chunk
    assert not served(Batch([Chunk(first, 2, 1, sample=False)]))  # the last token of a budget
    assert not served(Batch([*decode_batch(decodes).chunks, Chunk(first, 0, 2, sample=True)]))
    assert not served(Batch())
    assert not served(decode_batch([first] * (MAX_SEQS + 1)))
    for index, sequence in enumerate(decodes):
        sequence.terms = tuple(Term(slot, weight + index) for slot in (0, 1) for weight in (0.1, 0.2, 0.3))
    assert served(decode_batch(decodes[:1]))  # 6 terms have room in the smallest graph
    assert not served(decode_batch(decodes))  # 12 do not in that of two rows
    assert world.capture.replayed == replayed + 1


def test_kernels_that_were_not_captured_run_eagerly(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.load(0, rank=3, seed=0)
    world.load(1, rank=3, seed=1)
    plain, odd = world.start(Term(0)), world.start(Term(1))
    world.lora.odd_slots.add(1)
    ids = torch.zeros(2, dtype=torch.int64)
    with caplog.at_level(logging.INFO, logger="loraplex.engine"):
        for _ in range(2):
            assert world.graphs.run(work_of(decode_batch([plain, odd])), ids) is None
    assert len([r for r in caplog.records if "run without graphs" in r.message]) == 1
    world.decode([plain])


def test_a_slot_that_holds_nothing_is_refused(world: World) -> None:
    world.load(0, rank=3, seed=0)
    sequence = world.start(Term(0))
    world.unload(0)
    with pytest.raises(ValueError, match="slot 0, which holds nothing"):
        world.graphs.run(work_of(decode_batch([sequence])), torch.zeros(1, dtype=torch.int64))


def test_capture_goes_from_the_largest_bucket_down(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[int, int]] = []
    with caplog.at_level(logging.INFO, logger="loraplex.engine"):
        graphs = capture_over(checkpoint, TapeCapture(), seen)
    assert graphs.sizes == (1, 2, 4, 8, 10)
    assert seen == [(0, 15), (3, 15), (6, 15), (9, 15), (12, 15), (15, 15)]
    assert re.search(r"captured 15 decode graphs, batch sizes 1, 2, 4, 8, 10, in \d+\.\d s: 4096 bytes", caplog.text)


@pytest.mark.parametrize(
    ("refusal", "raised", "advice"),
    [
        (RuntimeError("no"), InternalError, "--graphs off"),
        (torch.OutOfMemoryError("no"), OverCapacity, "--kv-cache-memory"),
    ],
)
@pytest.mark.parametrize(("refuse_at", "where"), [(0, "10 sequences without"), (4, "8 sequences with .*plain")])
def test_a_failed_capture_names_its_bucket(
    checkpoint: Path, refusal: Exception, raised: type[Exception], advice: str, refuse_at: int, where: str
) -> None:
    capture = TapeCapture()
    capture.refuse_at, capture.refusal = refuse_at, refusal
    with pytest.raises(raised, match=f"{where}.*{advice}"):
        capture_over(checkpoint, capture, [])


def test_a_rank_that_goes_away_while_capturing_is_no_failed_capture(checkpoint: Path) -> None:
    capture = TapeCapture()
    capture.refuse_at, capture.refusal = 1, GroupLost("rank 1 of 2 ended")
    with pytest.raises(GroupLost, match=r"^rank 1 of 2 ended$"):
        capture_over(checkpoint, capture, [])


def capture_over(checkpoint: Path, capture: TapeCapture, seen: list[tuple[int, int]]) -> DecodeGraphs:
    lora, attention = TapeLora(), TapeAttention()
    model = load_tiny(checkpoint, lora=lora, attention=attention)
    ops = Ops(lora, attention, new_cache(model, attention), model.device)
    limits = GraphLimits(MAX_SEQS, MAX_LEN)
    return DecodeGraphs(model, ops, limits, capture, lambda done, total: seen.append((done, total)))


@pytest.mark.parametrize("backend", [TapeLora, ReferenceLora], ids=["with a static plan", "without"])
@pytest.mark.parametrize("num_tokens", [7, 10_000])
def test_the_first_step_leaves_the_cache_blank(checkpoint: Path, backend: type[ReferenceLora], num_tokens: int) -> None:
    lora, attention = backend(), ReferenceAttention()
    model = load_tiny(checkpoint, lora=lora, attention=attention)
    cache = new_cache(model, attention)
    written: list[int] = []
    zero_pages = cache.zero_pages
    cache.zero_pages = lambda pages: (written.extend(p for p in pages if cache.pages[:, :, p].any()), zero_pages(pages))
    warm_up(model, Ops(lora, attention, cache, model.device), num_tokens=num_tokens, num_sampled=5)
    count = min(num_tokens, model.max_position, (NUM_PAGES - 1) * PAGE_SIZE)
    assert written == list(range(1, 1 + -(-count // PAGE_SIZE)))
    assert not cache.pages.any()


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 8, 9, 64, 65, 256, 1000])
def test_buckets_bound_the_padding(max_num_seqs: int) -> None:
    sizes = bucket_sizes(max_num_seqs)
    assert sizes == tuple(sorted(set(sizes)))
    assert sizes[-1] == max_num_seqs
    for batch in range(1, max_num_seqs + 1):
        size = min(s for s in sizes if s >= batch)
        assert size - batch < 8 if size <= 64 else size - batch < size / 5
    assert len(sizes) <= 11 + max_num_seqs // 16


def test_backends_without_static_plans_are_named(checkpoint: Path) -> None:
    lora, attention = ReferenceLora(), ReferenceAttention()
    model = load_tiny(checkpoint)
    cache = new_cache(model, TapeAttention())
    assert why_not(Ops(TapeLora(), TapeAttention(), cache, model.device)) == ""
    assert why_not(Ops(lora, TapeAttention(), cache, model.device)) == "lora backend 'reference' cannot be captured"
    assert why_not(Ops(lora, attention, cache, model.device)).endswith(
        "attention backend 'reference' cannot be captured"
    )
