"""A whole engine over models with states: in any mix of steps each sequence has the tokens that it has alone."""

from __future__ import annotations

import math
import random
from functools import cache
from pathlib import Path

import pytest
import torch

from loraplex.engine import rank as engine_rank
from loraplex.engine.local import LocalEngine
from loraplex.engine.pools import PoolSizes
from loraplex.errors import InvalidConfig
from loraplex.types import FinishReason, Request, SamplingParams, StopRule
from tests.engines import in_random_arrival, local_engine
from tests.fakes_graphs import TapeAttention, TapeCapture, TapeLora
from tests.fakes_state_graphs import TapeConv, TapeSsd
from tests.oracle import make_adapter
from tests.ranks import ranked_engine
from tests.streams import MODES
from tests.tiny import oracle, prompt, tiny_checkpoint

#: states alone; states and pages; states, pages, and time steps that are limited in prompts alone
ARCHS = ("mamba2", "bamba", "nemotron_h")
FAMILIES = (*ARCHS, "falcon_h1", "granitemoehybrid")
MAX_TOKENS = 10
SETTINGS: dict[str, object] = {"kv_page_size": 4, "max_num_batched_tokens": 12, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state-engine")


def serve(root: Path, arch: str, mode: str = "none", **engine: object) -> LocalEngine:
    return local_engine(checkpoint(root, arch), mode=mode, **{**SETTINGS, **engine})  # type: ignore[arg-type]


def checkpoint(root: Path, arch: str) -> Path:
    """Time steps are mostly below where Nemotron-H's limits hold them."""
    return tiny_checkpoint(root, arch, **({"time_step_min": 0.9} if arch == "nemotron_h" else {}))


def asked(name: str, token_ids: tuple[int, ...], max_tokens: int = MAX_TOKENS, **fields: object) -> Request:
    return Request(name, token_ids, stop=StopRule(max_tokens=max_tokens, ignore_eos=True), **fields)  # type: ignore[arg-type]


def mixed(seed: int, count: int = 14) -> list[Request]:
    """Prompts of 1 to 40 tokens, many of which share a prefix or are equal."""
    rng, shared = random.Random(seed), prompt(21, seed=99)
    starts = [rng.choice(((), shared[:9], shared[:16], shared)) for _ in range(count)]
    return [
        asked(f"r{index}", start + prompt(rng.randint(1, 19), seed=rng.randint(0, 3)))
        for index, start in enumerate(starts)
    ]


def whole_and_alone(root: Path, arch: str, requests: list[Request]) -> list[list[int]]:
    """Each prompt in one piece, without anything cached, and nobody beside it."""
    asked = tuple((request.prompt_token_ids, request.stop.max_tokens, request.sampling) for request in requests)
    return [list(tokens) for tokens in _alone(root, arch, asked)]


@cache
def _alone(root: Path, arch: str, wanted: tuple[tuple[tuple[int, ...], int, SamplingParams], ...]) -> list[list[int]]:
    engine = serve(root, arch, max_num_batched_tokens=512, prefix_cache=False)
    requests = [asked("alone", token_ids, most, sampling=sampling) for token_ids, most, sampling in wanted]
    return [engine.generate([request])[0].token_ids for request in requests]


def holds_nothing(engine: LocalEngine) -> bool:
    while engine.core.has_work:
        engine.turn()
    scheduler = engine.core._scheduler
    assert scheduler.states is not None
    return not (scheduler.pages.num_held or scheduler.states.slots.num_held)


@pytest.mark.parametrize("arch", FAMILIES)
def test_alone_it_has_the_tokens_of_transformers(root: Path, arch: str) -> None:
    model = oracle(checkpoint(root, arch))
    requests = [asked(f"r{count}", prompt(count, seed=count)) for count in (1, 2, 7, 16, 33)]
    expected = []
    for request in requests:
        ids = torch.tensor([request.prompt_token_ids])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_TOKENS,
            min_new_tokens=MAX_TOKENS,
            do_sample=False,
        )
        expected.append(made[0, ids.shape[1] :].tolist())
    assert whole_and_alone(root, arch, requests) == expected


@pytest.mark.parametrize(
    ("arch", "mode"),
    [*((arch, mode) for arch in ARCHS for mode in MODES), ("falcon_h1", "lazy"), ("granitemoehybrid", "none")],
)
def test_chunked_cached_and_batched_as_whole_and_alone(root: Path, arch: str, mode: str) -> None:
    requests = mixed(seed=1)
    engine = serve(root, arch, mode)
    got = in_random_arrival(engine, requests * 2, random.Random(2), most=3)
    assert [g.token_ids for g in got] == whole_and_alone(root, arch, requests) * 2
    cached = [g.usage.cached_prompt_tokens for g in got]
    assert any(cached[: len(requests)]), "nobody went on behind another's prompt"
    again = [(len(r.prompt_token_ids) - 1) // 4 * 4 for r in requests]
    assert cached[len(requests) :] == again, "the same prompts again"
    assert holds_nothing(engine)


@pytest.mark.parametrize("mode", ["none", "lazy"])
def test_as_many_slots_as_sequences(root: Path, mode: str) -> None:
    """Snapshots come and go in slots that no sequence needs at the moment."""
    requests = [request for request in mixed(seed=3, count=7) for _ in range(2)]
    slot_bytes = serve(root, "mamba2").core.model_info.state_slot_bytes
    engine = serve(root, "mamba2", mode, kv_cache_memory=3 * slot_bytes)
    assert (engine.core.model_info.state_num_slots, engine.core.model_info.max_num_seqs) == (3, 3)
    got = in_random_arrival(engine, requests, random.Random(4), most=20)
    assert [g.token_ids for g in got] == whole_and_alone(root, "mamba2", requests)
    assert any(g.usage.cached_prompt_tokens for g in got)
    assert max(report.running for report in engine.reports) == 3
    assert holds_nothing(engine)


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("mode", ["none", "lazy"])
def test_preempted_as_undisturbed(root: Path, arch: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [asked(f"r{seed}", prompt(9, seed=seed), max_tokens=14) for seed in range(6)]
    expected = whole_and_alone(root, arch, requests)
    monkeypatch.setattr(engine_rank, "pool_sizes", lambda *_: PoolSizes(num_pages=15, num_slots=8))
    engine = serve(root, arch, mode)
    got = in_random_arrival(engine, requests, random.Random(5), most=1)
    assert [g.token_ids for g in got] == expected
    assert engine.core._scheduler.num_preemptions
    assert holds_nothing(engine)


@pytest.mark.parametrize("mode", ["none", "lazy"])
def test_the_next_turn_of_a_chat_goes_on_behind_the_answer(root: Path, mode: str) -> None:
    first = asked("first", prompt(9), max_tokens=15)
    engine = serve(root, "mamba2", mode)
    (answered,) = engine.generate([first])
    second = asked("second", (*first.prompt_token_ids, *answered.token_ids, *prompt(3, seed=7)))
    (got,) = engine.generate([second])
    assert [got.token_ids] == whole_and_alone(root, "mamba2", [second])
    assert got.usage.cached_prompt_tokens == 20, "of 23 tokens that were computed"


def test_an_answer_under_limited_steps_is_computed_again_as_a_prompt(root: Path) -> None:
    first = asked("first", prompt(9), max_tokens=15)
    engine = serve(root, "nemotron_h")
    (answered,) = engine.generate([first])
    second = asked("second", (*first.prompt_token_ids, *answered.token_ids, *prompt(3, seed=7)))
    (got,) = engine.generate([second])
    assert [got.token_ids] == whole_and_alone(root, "nemotron_h", [second])
    assert got.usage.cached_prompt_tokens == 8, "its prompt's"


def test_without_a_prefix_cache_nothing_is_saved(root: Path) -> None:
    engine = serve(root, "mamba2", prefix_cache=False)
    assert engine.core.model_info.state_num_slots == 4
    for _ in range(2):
        (got,) = engine.generate([asked("r", prompt(20))])
        assert got.usage.cached_prompt_tokens == 0
    assert engine.reports[-1].state_slots_free == 4


@pytest.mark.parametrize("mode", ["none", "lazy"])
def test_poison_in_blank_slots_reaches_nobody(root: Path, mode: str) -> None:
    requests = mixed(seed=6, count=6)
    engine = serve(root, "bamba", mode)
    poison(engine, range(engine.core.model_info.state_num_slots))
    got = engine.generate(requests)
    assert [g.token_ids for g in got] == whole_and_alone(root, "bamba", requests)


@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_that_turns_non_finite_leaves_nothing_behind(root: Path, mode: str) -> None:
    requests = [asked(f"r{seed}", prompt(9, seed=seed), max_tokens=16) for seed in range(3)]
    expected = whole_and_alone(root, "mamba2", requests)
    engine = serve(root, "mamba2", mode, max_num_batched_tokens=32)
    victim = engine.submit(asked("victim", prompt(11, seed=50), max_tokens=30))
    tickets = [engine.submit(request) for request in requests]
    for _ in range(4):
        engine.turn()
    (sequence,) = (s for s in engine.core._scheduler.running if s.request.request_id == "victim")
    assert sequence.states is not None
    poisoned, known = sequence.states.slot, len(engine.generations[victim].token_ids)
    poison(engine, [poisoned])
    engine.run_until_idle()
    failure = engine.generations[victim].failure
    assert failure is not None
    assert failure.error == "NonFinite"
    assert [engine.generations[ticket].token_ids for ticket in tickets] == expected
    assert holds_nothing(engine)
    text = (*prompt(11, seed=50), *engine.generations[victim].token_ids)
    assert len(text) <= 11 + known + 2
    follower = asked("follower", (*text, *prompt(9, seed=51)))
    assert [g.token_ids for g in engine.generate([follower])] == whole_and_alone(root, "mamba2", [follower])
    pool = engine.core._steps.executor.runner.ops.states.pool  # type: ignore[union-attr]
    kept = [snapshot.slot for snapshot in engine.core._scheduler.states.slots._snapshots.values()]  # type: ignore[union-attr]
    assert kept
    assert all(bool(torch.isfinite(layer[kept]).all()) for layer in (*pool.conv, *pool.ssd))


@pytest.mark.parametrize("mode", ["none", "lazy"])
def test_what_is_aborted_gives_all_back(root: Path, mode: str) -> None:
    requests = mixed(seed=8)
    engine = serve(root, "bamba", mode)
    rng = random.Random(9)
    tickets = []
    for request in requests:
        tickets.append(engine.submit(request))
        for _ in range(rng.randint(0, 3)):
            engine.turn()
        if rng.random() < 0.5:
            engine.abort(rng.choice(tickets))
    engine.run_until_idle()
    ended = [engine.generations[ticket] for ticket in tickets]
    expected = whole_and_alone(root, "bamba", requests)
    assert {g.finish for g in ended} == {FinishReason.CANCELLED, FinishReason.LENGTH}
    for generation, tokens in zip(ended, expected, strict=True):
        assert generation.token_ids == tokens[: len(generation.token_ids)]
    assert holds_nothing(engine)


@pytest.mark.parametrize("mode", ["none", "lazy"])
def test_a_probe_leaves_running_sequences_their_states(root: Path, mode: str) -> None:
    requests = [asked(f"r{seed}", prompt(9, seed=seed), max_tokens=30) for seed in range(4)]
    adapter = make_adapter(checkpoint(root, "bamba"), root / "adapter", seed=1, target_modules=["q_proj", "out_proj"])
    engine = serve(root, "bamba", mode, adapter_dirs=(root,))
    tickets = [engine.submit(request) for request in requests]
    engine.turn()
    probe = engine.load_adapter("a", str(adapter)).probe
    assert probe is not None
    assert probe.max_change > 0
    engine.run_until_idle()
    assert [engine.generations[ticket].token_ids for ticket in tickets] == whole_and_alone(root, "bamba", requests)


@pytest.mark.parametrize("mode", ["none", "eager"])
@pytest.mark.parametrize("arch", ARCHS)
def test_under_graphs(root: Path, arch: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for op, backend in (("lora", TapeLora), ("attention", TapeAttention), ("conv", TapeConv), ("ssd", TapeSsd)):
        monkeypatch.setattr(engine_rank, f"choose_{op}", lambda name, device, made=backend, **_: made())
    requests = [*mixed(seed=10, count=8), asked("short", prompt(1))]
    expected = whole_and_alone(root, arch, requests)
    capture = TapeCapture()
    engine = serve(root, arch, mode, capture=capture)
    assert engine.core.model_info.backends["graphs"] == "on"
    got = in_random_arrival(engine, requests, random.Random(11), most=2)
    assert [g.token_ids for g in got] == expected
    assert capture.replayed > 10
    if arch != "nemotron_h":  # of which nothing of an answer is kept
        following = [
            asked(f"then {r.request_id}", (*r.prompt_token_ids, *tokens, 5))
            for r, tokens in zip(requests, expected, strict=True)
        ]
        then = engine.generate(following)
        assert [g.token_ids for g in then] == whole_and_alone(root, arch, following)
        computed = [len(r.prompt_token_ids) + MAX_TOKENS - 1 for r in requests]
        assert [g.usage.cached_prompt_tokens for g in then] == [count // 4 * 4 for count in computed]


def test_backends_without_static_plans_cannot_be_captured(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_rank, "choose_lora", lambda name, device: TapeLora())
    options = {"conv_backend": "reference", "ssd_backend": "reference", "capture": TapeCapture()}
    with pytest.raises(InvalidConfig, match="conv backend 'reference' cannot be captured and ssd backend 'reference'"):
        serve(root, "mamba2", graphs="on", **options)


@pytest.mark.parametrize("arch", ARCHS)
def test_two_ranks_give_the_tokens_of_one(root: Path, arch: str) -> None:
    requests = [*mixed(seed=12, count=6), asked("drawn", prompt(8), sampling=SamplingParams(temperature=1.0, seed=3))]
    expected = whole_and_alone(root, arch, requests)
    with ranked_engine(checkpoint(root, arch), 2, mode="eager", **SETTINGS) as ranked:
        got = ranked.engine.generate(requests) + ranked.engine.generate(requests)
        assert [g.token_ids for g in got] == expected * 2
        assert all(g.usage.cached_prompt_tokens for g in got[len(requests) :] if len(g.request.prompt_token_ids) > 4)
        pools = [runner.ops.states.pool for runner in ranked.runners if runner.ops.states is not None]
        assert {pool.num_slots for pool in pools} == {ranked.engine.core.model_info.state_num_slots}
        assert len(pools) == 2


def poison(engine: LocalEngine, slots: range | list[int]) -> None:
    """Fill slots with what is no number, behind what runs."""
    runner = engine.core._steps.executor.runner
    states = runner.ops.states
    assert states is not None

    def write() -> None:
        for layer in (*states.pool.conv, *states.pool.ssd):
            layer[list(slots)] = math.nan

    if runner.stream is None:
        write()
    else:
        runner.stream.put(write)
