"""The next step is launched before this one is waited for: nothing that comes of it is different, only earlier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from loraplex.engine.batch import pack
from loraplex.engine.inflight import InFlight, SentWords
from loraplex.engine.local import Generation, LocalEngine
from loraplex.engine.sampler import plan_draws
from loraplex.engine.sequence import Batch, Chunk, Origin, Sequence
from loraplex.engine.stream import CudaStream, Fetch
from loraplex.engine.uses import Uses
from loraplex.engine.work import UNKNOWN, StepWork, work_of
from loraplex.types import AdapterRef, FinishReason, OutputOptions, Request, SamplingParams, StopRule
from tests.engines import local_engine, make_adapters
from tests.streams import MODES, EagerStream, LazyStream
from tests.tiny import prompt, tiny_checkpoint

EVEN = tuple(range(0, 96, 2))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("overlap")


def serve(root: Path, mode: str, *names: str, **engine: object) -> LocalEngine:
    base = tiny_checkpoint(root, "llama", tie_word_embeddings=False)
    settings = {"kv_page_size": 4, "max_num_batched_tokens": 16, "max_num_seqs": 6, **engine}
    made = local_engine(base, adapter_dirs=(root,), mode=mode, **settings)
    for name in names:
        made.load_adapter(name, str(make_adapters(base, root / "adapters")[name]))
    return made


def asked(seed: int, *, tokens: int = 9, **fields: object) -> Request:
    stop = fields.pop("stop", None) or StopRule(max_tokens=10, ignore_eos=True)
    return Request(f"r{seed}", prompt(tokens, seed=seed), stop=stop, **fields)  # type: ignore[arg-type]


def outcome(generation: Generation) -> tuple[object, ...]:
    """All that a caller sees, durations left out; logprobs are rounded, because neighbours differ."""
    g = generation
    explained = [(one.token_id, round(one.logprob, 4)) for one in (*g.prompt_logprobs, *g.logprobs)]
    return (g.token_ids, explained, g.finish, g.failure, g.num_endings, g.usage.completion_tokens)


def holds_nothing(engine: LocalEngine) -> bool:
    core = engine.core
    users = [entry.users for entry in core._desk._bank._entries.values()]
    return not (core.has_work or core.num_sequences or core._scheduler.pages.num_held or any(users))


class Diary(EagerStream):
    """Writes down what is launched and what is waited for."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self._count = 0

    def fetch(self, work: Callable[[], torch.Tensor]) -> Fetch:
        self._count += 1
        self.entries.append(f"launch {self._count}")
        return _Noted(super().fetch(work), self._count, self.entries)


@dataclass(frozen=True, slots=True)
class _Noted:
    fetch: Fetch
    number: int
    entries: list[str]

    def wait(self, watch: Callable[[], None] | None = None) -> list[int]:
        self.entries.append(f"wait {self.number}")
        return self.fetch.wait(watch)


def test_each_step_is_launched_before_the_one_before_it_is_waited_for(root: Path) -> None:
    engine = serve(root, "none")
    diary = engine.core._steps.executor.runner.stream = Diary()
    engine.generate([asked(1, stop=StopRule(max_tokens=4, ignore_eos=True))])
    assert diary.entries == ["launch 1", "launch 2", "wait 1", "launch 3", "wait 2", "launch 4", "wait 3", "wait 4"]


def test_chunks_of_a_prompt_follow_each_other_at_once(root: Path) -> None:
    engine = serve(root, "none", max_num_batched_tokens=6)
    diary = engine.core._steps.executor.runner.stream = Diary()
    engine.generate([asked(1, tokens=17, stop=StopRule(max_tokens=1, ignore_eos=True))])
    assert diary.entries == ["launch 1", "launch 2", "wait 1", "launch 3", "wait 2", "wait 3"]


KINDS: dict[str, dict[str, object]] = {
    "drawn": {"sampling": SamplingParams(temperature=1.0, seed=3)},
    "nucleus": {"sampling": SamplingParams(temperature=1.3, top_p=0.9, min_p=0.01, seed=4)},
    "best": {"sampling": SamplingParams(temperature=0.8, top_k=7, seed=5)},
    "stopping": {"stop": StopRule(max_tokens=10, stop_token_ids=EVEN)},
    "not yet": {"stop": StopRule(max_tokens=10, stop_token_ids=EVEN, min_tokens=4)},
    "penalized": {"sampling": SamplingParams(repetition_penalty=1.3, presence_penalty=0.5)},
    "explained": {"output": OutputOptions(logprobs=2)},
    "all explained": {"output": OutputOptions(logprobs=1, prompt_logprobs=True)},
    "greedy": {},
    "adapted": {"adapters": (AdapterRef("all"),)},
    "one": {"stop": StopRule(max_tokens=1, ignore_eos=True)},
}


def together(root: Path, mode: str, kinds: list[str], device: str = "cpu") -> tuple[LocalEngine, list[Generation]]:
    """Two of each kind, arriving while others run."""
    engine = serve(root, mode, "all", device=device)
    engine.reports.clear()
    tickets = []
    for seed, kind in enumerate(kinds * 2):
        tickets.append(engine.submit(asked(seed, tokens=5 + seed, **KINDS[kind])))
        engine.turn()
    engine.run_until_idle()
    while engine.core.has_work:
        engine.turn()
    return engine, [engine.generations[ticket] for ticket in tickets]


@pytest.mark.parametrize("mode", ["eager", "lazy"])
@pytest.mark.parametrize(
    "kinds", [list(KINDS), ["greedy", "stopping", "drawn", "adapted", "one"]], ids=["all", "ahead"]
)
def test_everything_a_caller_sees_is_the_same(root: Path, mode: str, kinds: list[str]) -> None:
    _, plain = together(root, "none", kinds)
    engine, overlapped = together(root, mode, kinds)
    assert [outcome(g) for g in overlapped] == [outcome(g) for g in plain]
    assert {g.finish for g in plain} == {FinishReason.STOP, FinishReason.LENGTH}
    assert all(g.num_endings == 1 for g in overlapped)
    assert holds_nothing(engine)


@pytest.mark.parametrize("mode", MODES)
def test_no_row_is_run_for_a_token_that_cannot_be_wanted(root: Path, mode: str) -> None:
    engine = serve(root, mode, max_num_batched_tokens=64)
    engine.generate([asked(seed, stop=StopRule(max_tokens=1 + seed, ignore_eos=True)) for seed in range(5)])
    assert sum(report.decode_tokens for report in engine.reports) == sum(range(5))
    assert sum(report.prefill_tokens for report in engine.reports) == 5 * 9


@pytest.mark.parametrize("mode", MODES)
def test_the_models_length_is_known_in_advance_too(root: Path, mode: str) -> None:
    engine = serve(root, mode, kv_cache_memory=8 * 4 * 2 * 2 * 2 * 8 * 4)
    longest = engine.core.model_info.max_model_len
    (got,) = engine.generate([asked(1, stop=StopRule(max_tokens=500, ignore_eos=True))])
    assert got.finish is FinishReason.LENGTH
    assert len(got.token_ids) == longest - 9
    assert sum(report.decode_tokens for report in engine.reports) == longest - 9 - 1


@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_a_row_too_many_leaves_nothing_behind(root: Path, mode: str) -> None:
    """A token ends its sequence while the next step runs: that row is passed over, and is not in the prefix index."""
    plain, ahead = serve(root, "none"), serve(root, mode)
    for seed in range(8):  # some ends fall on the last slot of a page
        request = asked(seed, tokens=6 + seed, stop=StopRule(max_tokens=20, stop_token_ids=EVEN))
        assert [outcome(g) for g in ahead.generate([request])] == [outcome(g) for g in plain.generate([request])]
        while ahead.core.has_work:
            ahead.turn()
        assert ahead.core._scheduler.pages.num_cached == plain.core._scheduler.pages.num_cached
    rows = [sum(r.decode_tokens for r in engine.reports) for engine in (plain, ahead)]
    assert rows[0] < rows[1] <= rows[0] + 8, "at most one row too many for each"
    assert holds_nothing(ahead)


def test_the_step_in_flight_is_work(root: Path) -> None:
    engine = serve(root, "lazy")
    ticket = engine.submit(asked(1))
    engine.turn()
    engine.abort(ticket)
    assert engine.core.num_sequences == 0
    assert engine.core.has_work, "a step is in flight"
    engine.turn()
    assert engine.generations[ticket].finish is FinishReason.CANCELLED
    assert engine.generations[ticket].token_ids == []
    assert holds_nothing(engine)


def test_cancelled_work_reads_what_it_was_launched_with(root: Path) -> None:
    """Its adapter is unloaded, its slot and its pages go to others, and all that while its step has not run."""
    names = ("all", "attention", "one")
    engine, alone = serve(root, "lazy", "all"), serve(root, "none", *names)
    neighbour = engine.submit(asked(1))
    victims = [engine.submit(asked(2 + i, adapters=(AdapterRef("all"),))) for i in range(2)]
    for _ in range(3):
        engine.turn()
    for victim in victims:
        engine.abort(victim)
    engine.unload_adapter("all")
    base = tiny_checkpoint(root, "llama", tie_word_embeddings=False)
    later = []
    for name in names[1:]:
        engine.load_adapter(name, str(make_adapters(base, root / "adapters")[name]))
        later.append(engine.submit(asked(5, adapters=(AdapterRef(name),))))
    engine.run_until_idle()
    expected = alone.generate([asked(1), *(asked(5, adapters=(AdapterRef(name),)) for name in names[1:])])
    assert [engine.generations[t].token_ids for t in (neighbour, *later)] == [g.token_ids for g in expected]
    assert all(engine.generations[v].finish is FinishReason.CANCELLED for v in victims)


def test_penalties_hold_the_engine_back_only_while_they_run(root: Path) -> None:
    engine = serve(root, "none", max_num_batched_tokens=64)
    diary = engine.core._steps.executor.runner.stream = Diary()
    short = StopRule(max_tokens=2, ignore_eos=True)
    tickets = [engine.submit(asked(1)), engine.submit(asked(2, stop=short, **KINDS["penalized"]))]  # type: ignore[arg-type]
    engine.turn()
    engine.turn()
    assert engine.generations[tickets[1]].over
    assert diary.entries == []
    engine.run_until_idle()
    assert diary.entries[:3] == ["launch 1", "launch 2", "wait 1"]


@pytest.mark.parametrize("behind", [False, True], ids=["alone", "with another behind it"])
def test_a_step_that_fails_fails_what_was_launched_on_top(root: Path, behind: bool) -> None:
    engine = serve(root, "lazy")
    stream = engine.core._steps.executor.runner.stream
    assert isinstance(stream, LazyStream)
    first = engine.submit(asked(1))
    for _ in range(3):
        engine.turn()
    told = len(engine.generations[first].token_ids)
    second = engine.submit(asked(2)) if behind else None  # its prefill is in the step behind the one that fails
    stream.fail_next = RuntimeError("the device fell over")
    engine.turn()
    third = engine.submit(asked(3))
    engine.run_until_idle()
    for ticket in (first, second):
        if ticket is not None:
            failure = engine.generations[ticket].failure
            assert failure is not None
            assert failure.error == "InternalError"
            assert engine.generations[ticket].num_endings == 1
    assert len(engine.generations[first].token_ids) == told
    (alone,) = serve(root, "none").generate([asked(3)])
    assert engine.generations[third].token_ids == alone.token_ids
    assert holds_nothing(engine)


def test_a_launch_that_fails_lets_the_step_before_it_be_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = serve(root, "lazy", max_num_batched_tokens=64)
    going, ending = engine.submit(asked(1)), engine.submit(asked(2, stop=StopRule(max_tokens=2, ignore_eos=True)))
    engine.turn()
    engine.turn()
    monkeypatch.setattr(engine.core._steps.executor, "launch", lambda *_: 1 / 0)
    engine.turn()
    monkeypatch.undo()
    assert engine.generations[ending].finish is FinishReason.LENGTH
    failed = engine.generations[going]
    assert failed.failure is not None
    assert "ZeroDivisionError" in failed.failure.message
    assert len(failed.token_ids) == 2
    assert holds_nothing(engine)


def test_steps_do_not_count_the_same_time_twice(root: Path) -> None:
    engine = serve(root, "lazy")
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    engine.core._steps._clock = clock
    engine.generate([asked(seed) for seed in range(3)])
    assert all(report.step_s > 0 for report in engine.reports if report.sequences)
    assert sum(report.step_s for report in engine.reports) <= now[0]


class TestUnknownTokens:
    """Nothing may take a token that is not there yet for one that is."""

    def launched(self, *, unknown: int = 1) -> Batch:
        sequence = Sequence(Origin(b"", 1), asked(1), Uses(), 0, 0.0)
        sequence.num_unknown = unknown
        sequence.pages = [1, 2, 3]
        start = sequence.num_tokens - 1
        return Batch([Chunk(sequence, start, 1, sample=True)])

    def test_they_are_sent_as_no_token(self, root: Path) -> None:
        batch = self.launched()
        before = InFlight(batch)
        work = work_of(batch, plan_draws([], 96), before.rows)
        sent = SentWords(work, torch.from_numpy(work.words))
        token_ids = sent.token_ids
        assert token_ids.tolist() == [UNKNOWN]
        with pytest.raises(IndexError):
            functional.embedding(token_ids, torch.zeros(96, 4))
        before.tokens.are(torch.tensor([17]))
        sent.fill_in(before.tokens)
        assert token_ids.tolist() == [17]

    def test_they_come_from_the_step_before_and_from_nowhere_else(self, root: Path) -> None:
        with pytest.raises(AssertionError, match="no step draws it"):
            work_of(self.launched(), plan_draws([], 96))
        with pytest.raises(AssertionError, match="more than one token is unknown"):
            work_of(self.launched(unknown=2), plan_draws([], 96))

    def test_a_step_that_does_not_overlap_refuses_them(self) -> None:
        with pytest.raises(ValueError, match="iterator too short"):
            work_of(self.launched())


class Graphs:
    """A captured form of pure decode steps: here, the same step once more."""

    def __init__(self, engine: LocalEngine) -> None:
        self._runner = engine.core._steps.executor.runner
        self.num_served = 0

    def run(self, work: StepWork, token_ids: torch.Tensor) -> torch.Tensor | None:
        if any(chunk.count > 1 for chunk in work.chunks):
            return None
        self.num_served += 1
        packed = pack(work, self._runner.ops, token_ids)
        return self._runner.model.head(self._runner.model.forward(packed.forward), packed.sampled.adapters)


def test_graphs_serve_the_steps_they_can(root: Path) -> None:
    requests = [asked(seed, tokens=4 + seed, **KINDS[kind]) for seed, kind in enumerate(KINDS)]
    plain, graphed = serve(root, "none", "all"), serve(root, "eager", "all")
    graphs = graphed.core._steps.executor.runner._graphs = Graphs(graphed)
    assert [outcome(g) for g in graphed.generate(requests)] == [outcome(g) for g in plain.generate(requests)]
    assert graphs.num_served >= 9


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_is_neither_waited_for_nor_sent_what_changes_under_it() -> None:
    stream = CudaStream(torch.device("cuda"))
    assert stream.fetch(lambda: stream.send(np.arange(3))).wait() == [0, 1, 2]  # loads kernels
    torch.cuda._sleep(1 << 29)  # type: ignore[no-untyped-call]
    fetches: list[Fetch] = []
    for number in range(64):
        sent = stream.send(np.full(500, number))

        def double(sent: torch.Tensor = sent) -> torch.Tensor:
            return sent * 2

        fetches.append(stream.fetch(double))
    assert not torch.cuda.current_stream().query(), "it slept all the while"
    assert [set(fetch.wait()) for fetch in fetches] == [{2 * number} for number in range(64)]


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_gives_the_tokens_that_a_cpu_gives(root: Path) -> None:
    kinds = ["greedy", "stopping", "adapted", "one", "not yet", "penalized"]
    _, plain = together(root, "none", kinds)
    engine, overlapped = together(root, "none", kinds, device="cuda")
    assert isinstance(engine.core._steps.executor.runner.stream, CudaStream)
    assert [outcome(g) for g in overlapped] == [outcome(g) for g in plain]
    assert holds_nothing(engine)
