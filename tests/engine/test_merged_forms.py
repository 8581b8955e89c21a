"""Adapters that are served merged: whole matrices of their own beside the base's, for requests that use them alone."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from loraplex.adapters import folding
from loraplex.adapters.delta import SiteDelta
from loraplex.engine import rank as engine_rank
from loraplex.engine.auto_merge import AutoMerge
from loraplex.engine.graphs import DecodeGraphs
from loraplex.engine.local import Generation, LocalEngine
from loraplex.engine.messages import LoadAdapter, SetResidentMode, UnloadAdapter
from loraplex.errors import InvalidAdapter, LoraplexError, Mismatch, NotFound, OverCapacity, UnsupportedFeature
from loraplex.layers.rows import PackedRows
from loraplex.types import (
    AdapterInfo,
    AdapterRef,
    OnConflict,
    OutputOptions,
    Request,
    Residency,
    ResidentMode,
    StopRule,
    UnloadMode,
)
from tests.engines import SIX_ADAPTERS, local_engine, make_adapters, mixed_requests
from tests.fakes_graphs import TapeAttention, TapeCapture, TapeLora
from tests.kind_matrix import KindMatrix
from tests.kind_runs import serve_all
from tests.peft_kinds import SOME_OF_ALL
from tests.ranks import ranked_engine
from tests.tiny import prompt, tiny_checkpoint

MERGED, AUTO = ResidentMode.MERGED, ResidentMode.AUTO
#: of these there is nothing to merge, or no way
NEVER = ("alora", "ln-tuning", "trainable-tokens")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_checkpoint(tmp_path_factory.mktemp("merged"), "llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    return make_adapters(base, base.parent / "adapters")


def serve(base: Path, adapters: dict[str, Path], **options: object) -> LocalEngine:
    options = {"kv_page_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32, **options}
    engine = local_engine(base, adapter_dirs=(base.parent,), **options)
    for name, path in adapters.items():
        engine.load_adapter(name, str(path))
    return engine


@pytest.fixture
def engine(base: Path, adapters: dict[str, Path]) -> LocalEngine:
    return serve(base, adapters)


def request(*names: str, tokens: int = 6, seed: int = 1, **fields: Any) -> Request:
    refs = tuple(AdapterRef(name) for name in names)
    return Request(f"r-{names}", prompt(9, seed), refs, stop=StopRule(max_tokens=tokens, ignore_eos=True), **fields)


def tokens_of(generations: list[Generation]) -> list[list[int]]:
    assert [g.failure for g in generations if g.failure] == []
    return [g.token_ids for g in generations]


def uids_in_use(engine: LocalEngine, one: Request) -> tuple[str, ...]:
    """What a request is run with."""
    engine.submit(one)
    engine.turn()
    (sequence,) = engine.core._scheduler.running
    engine.run_until_idle()
    return sequence.uids


def is_merged(engine: LocalEngine, one: Request) -> bool:
    return any(uid.endswith("+merged") for uid in uids_in_use(engine, one))


def until(engine: LocalEngine, reached: Callable[[], bool]) -> None:
    for _ in range(2000):
        if reached():
            return
        engine.turn()
        if not engine.core.has_work:
            time.sleep(0.001)
    raise AssertionError("it never came to that")


def folded_layers(engine: LocalEngine) -> int:
    tables = engine.core._steps.executor.runner.model.tables()
    return sum(len(ref.folded.held) for ref in tables.values() if ref.folded is not None)


def merged(engine: LocalEngine, *names: str) -> list[AdapterInfo]:
    return [engine.set_resident_mode(name, MERGED) for name in names]


def check_kinds(engine: LocalEngine, matrix: KindMatrix, *, at_once: int = 8) -> None:
    """Every adapter is merged or refused, and then all of them, in one batch, give PEFT's tokens."""
    for name in matrix.names:
        engine.load_adapter(name, str(matrix.adapter(name)))
        if name in NEVER:
            with pytest.raises(UnsupportedFeature, match=r"cannot be merged|nothing to merge"):
                engine.set_resident_mode(name, MERGED)
        else:
            assert engine.set_resident_mode(name, MERGED).merged_bytes > 0
            assert is_merged(engine, matrix.cases(name)[0].request)
    serve_all(engine, matrix, preempted=False, at_once=at_once)
    for name in matrix.names:
        assert engine.unload_adapter(name).merged_bytes == 0
    assert engine.core._desk._bank.stats().host_bytes == 0


#: those whose parts are cut in all ways
CUT = ("lora-lora-bias", "lora-ends", "dora", "bdlora", "ia3-up", "lora-saved-linear", "lora-added-tokens", "alora")
KIND_OPTIONS = {"max_num_batched_tokens": 32, "max_num_seqs": 24, "kv_page_size": 4}


def test_every_kind_is_merged_as_peft_has_it_or_refused(kinds_root: Path) -> None:
    """On biased linears."""
    matrix = KindMatrix(kinds_root, "llama", tied=False, among=SOME_OF_ALL)
    check_kinds(local_engine(matrix.base_dir, adapter_dirs=(matrix.root,), **KIND_OPTIONS), matrix)


def test_each_rank_merges_its_own_part(kinds_root: Path) -> None:
    """Of linears without biases, of which some get one."""
    matrix = KindMatrix(kinds_root, "qwen3", tied=True, among=CUT)
    with ranked_engine(matrix.base_dir, 2, adapter_dirs=(matrix.root,), **KIND_OPTIONS) as ranked:
        check_kinds(ranked.engine, matrix, at_once=6)
        for runner in ranked.runners:
            assert not runner.ops.lora.slots


def test_a_hundred_times_on_and_off_under_traffic_changes_no_token_and_no_bit_of_the_base(
    base: Path, adapters: dict[str, Path]
) -> None:
    engine = serve(base, adapters)
    watched = request(tokens=8, output=OutputOptions(logprobs=5, prompt_logprobs=True))
    before, requests = engine.generate([watched])[0], mixed_requests(3)
    expected = tokens_of(engine.generate(requests))
    rng, names = random.Random(1), list(SIX_ADAPTERS)
    running: dict[int, list[int]] = {}
    steps: list[str] = []

    def submit(index: int) -> None:
        running[engine.submit(requests[index])] = expected[index]

    for cycle in range(100):
        name = names[cycle % len(names)]
        own = [index for index, one in enumerate(requests) if [ref.name for ref in one.adapters] == [name]]
        assert engine.set_resident_mode(name, MERGED).merged_bytes > 0
        if cycle % 3 == 0:
            engine.run_until_idle()  # it has the first steps to itself
        submit(own[0])
        for _ in range(rng.randint(1, 3)):
            engine.turn()
            steps.append(kind_of_step(engine))
        submit(rng.randrange(len(requests)))
        assert engine.set_resident_mode(name, AUTO).merged_bytes == 0
        engine.turn()
        steps.append(kind_of_step(engine))
    engine.run_until_idle()
    assert min(steps.count("merged"), steps.count("mixed")) > 100
    got = {ticket: engine.generations[ticket].token_ids for ticket in running}
    assert got == running
    after = engine.generate([watched])[0]
    assert (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)
    assert after.prompt_logprobs == before.prompt_logprobs
    assert folded_layers(engine) == 0
    assert engine.core._desk._bank.stats().host_bytes == sum(info.bytes for info in engine.list_adapters())


def kind_of_step(engine: LocalEngine) -> str:
    """What a step is like for those who run: of a merged form alone, of one beside others, or of none."""
    merged = {sequence.uses.merged for sequence in engine.core._scheduler.running}
    return "plain" if not any(merged) else "merged" if len(merged) == 1 else "mixed"


def rows_multiplied(engine: LocalEngine, requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each step's first layer: rows that are multiplied by a merged form's matrix. They all run at once."""
    seen: list[int] = []
    layer = next(r.folded for r in engine.core._steps.executor.runner.model.tables().values() if r.folded is not None)
    multiply = PackedRows.multiply

    def watched(self: PackedRows, x: torch.Tensor) -> torch.Tensor:
        if any(self is held for held in layer.held.values()):
            seen.append(len(x))
        return multiply(self, x)

    monkeypatch.setattr(PackedRows, "multiply", watched)
    tokens_of(engine.generate(requests))
    return seen


def test_it_is_multiplied_by_in_steps_of_its_own_alone(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside others its adapter is served by its factors: nobody reads the weights of two models for one step."""
    merged(engine, "all", "one")
    alone = [request("all", tokens=3, seed=seed) for seed in (1, 2)]
    assert rows_multiplied(engine, alone, monkeypatch) == [18, 2, 2]
    short = msgspec.structs.replace(request("one", tokens=2), request_id="short")
    assert rows_multiplied(engine, [request("all", tokens=4), short], monkeypatch) == [1, 1]


def test_only_requests_that_use_it_alone_and_whole_are_given_the_merged_form(engine: LocalEngine) -> None:
    merged(engine, "all")
    uid = engine.get_adapter("all").uid
    assert uids_in_use(engine, request("all")) == (uid, f"{uid}+merged")
    half = msgspec.structs.replace(request("all"), adapters=(AdapterRef("all", 0.5),))
    beside_none = msgspec.structs.replace(request("all"), adapters=(AdapterRef("all"), AdapterRef("one", 0.0)))
    assert uids_in_use(engine, half) == (uid,)
    assert uid in uids_in_use(engine, request("all", "one"))
    assert uids_in_use(engine, beside_none) == (uid, f"{uid}+merged")
    [told] = engine.generate([request("all")])
    assert [adapter.uid for adapter in told.adapters] == [uid]


def test_pages_of_the_two_forms_are_never_each_others(engine: LocalEngine) -> None:
    cached = [engine.generate([request("all")])[0].usage.cached_prompt_tokens for _ in range(2)]
    merged(engine, "all")
    cached += [engine.generate([request("all")])[0].usage.cached_prompt_tokens for _ in range(2)]
    assert cached == [0, 8, 0, 8]


def test_who_runs_ends_on_what_it_began_with_and_the_memory_is_free_then(engine: LocalEngine) -> None:
    merged(engine, "all")
    engine.submit(request("all", tokens=12))
    engine.turn()
    (sequence,) = engine.core._scheduler.running
    info = engine.set_resident_mode("all", AUTO)
    assert (info.resident_mode, info.merged_bytes) == (AUTO, 0)
    assert folded_layers(engine) > 0
    assert sequence.uids == (info.uid, f"{info.uid}+merged")
    again = engine.submit(request("all", tokens=12))
    engine.turn()
    assert engine.core._scheduler.running[-1].uids == (info.uid,)
    engine.run_until_idle()
    first, second = list(engine.generations.values())[-2:]
    assert first.token_ids == second.token_ids == engine.generations[again].token_ids
    assert folded_layers(engine) == 0


@pytest.mark.parametrize("mode", [UnloadMode.DRAIN, UnloadMode.ABORT])
def test_it_goes_with_its_adapter(engine: LocalEngine, mode: UnloadMode) -> None:
    merged(engine, "all")
    engine.submit(request("all", tokens=9))
    engine.turn()
    engine.unload_adapter("all", mode)
    assert folded_layers(engine) == 0
    assert not any("+merged" in uid for uid in engine.core._desk._bank.stats().host_uids)


def test_a_new_version_is_merged_as_the_last_one_was(engine: LocalEngine, adapters: dict[str, Path]) -> None:
    merged(engine, "all")
    other = engine.generate([request("attention")])[0].token_ids
    old = engine.get_adapter("all").uid
    engine.submit(request("all", tokens=9))
    engine.turn()
    engine.load_adapter("all", str(adapters["attention"]), OnConflict.REPLACE)
    engine.run_until_idle()
    until(engine, lambda: engine.get_adapter("all").merged_bytes > 0)
    assert is_merged(engine, request("all"))
    assert engine.generate([request("all")])[0].token_ids == other
    assert old + "+merged" not in engine.core._desk._bank.stats().host_uids


def test_one_that_is_loaded_to_be_merged_serves_before_it_is(base: Path, adapters: dict[str, Path]) -> None:
    """As after a restart of the engine."""
    engine = serve(base, {})
    op = engine.begin_op()
    reply = engine.wait(op, LoadAdapter(op, "all", str(adapters["all"]), resident_mode=MERGED))
    assert (reply.adapters[0].resident_mode, reply.adapters[0].merged_bytes) == (MERGED, 0)
    until(engine, lambda: engine.get_adapter("all").merged_bytes > 0)
    assert is_merged(engine, request("all"))


def test_two_names_of_one_content_share_the_form(engine: LocalEngine, adapters: dict[str, Path]) -> None:
    engine.load_adapter("twin", str(adapters["all"]))
    first, second = merged(engine, "all", "twin")
    assert first.merged_bytes == second.merged_bytes
    layers = folded_layers(engine)
    engine.set_resident_mode("all", AUTO)
    assert not is_merged(engine, request("all"))
    assert is_merged(engine, request("twin"))
    assert folded_layers(engine) == layers
    engine.unload_adapter("twin")
    assert folded_layers(engine) == 0


def test_what_does_not_fit_is_refused_in_bytes_and_changes_nothing(base: Path, adapters: dict[str, Path]) -> None:
    engine = serve(base, adapters, adapter_memory=80_000)
    before = engine.core._desk._bank.stats()
    with pytest.raises(OverCapacity, match=r"merged it takes 90112 bytes .* of which 80000 are available"):
        engine.set_resident_mode("all", MERGED)
    assert engine.core._desk._bank.stats() == before
    assert engine.get_adapter("all").resident_mode is AUTO
    merged(engine, "attention")
    with pytest.raises(OverCapacity, match=r"merged it takes 51200 bytes .* of which 47232 are available"):
        engine.set_resident_mode("vocabulary", MERGED)
    assert is_merged(engine, request("attention"))
    assert not is_merged(engine, request("vocabulary"))
    for name in SIX_ADAPTERS:  # room is left for all others in turn
        engine.generate([request(name)])
    assert is_merged(engine, request("attention"))


def test_what_is_refused_or_given_up_leaves_nothing(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(adapters["all"], base.parent / "moved", dirs_exist_ok=True)
    engine = serve(base, {**adapters, "moved": base.parent / "moved"})
    with pytest.raises(NotFound, match="'none' is not loaded"):
        engine.set_resident_mode("none", MERGED)
    shutil.copytree(adapters["one"], base.parent / "moved", dirs_exist_ok=True)
    with pytest.raises(Mismatch, match="has changed since it was loaded"):
        engine.set_resident_mode("moved", MERGED)
    shutil.rmtree(base.parent / "moved")
    with pytest.raises(LoraplexError, match="moved"):
        engine.set_resident_mode("moved", MERGED)
    ops = [engine.begin_op() for _ in range(3)]
    engine.core.handle(b"local", SetResidentMode(ops[0], "one", MERGED))
    engine.core.handle(b"local", SetResidentMode(ops[1], "patterned", MERGED))
    with pytest.raises(Mismatch, match="'one': its resident mode was set to auto while it was merged"):
        engine.wait(ops[0], SetResidentMode(engine.begin_op(), "one", AUTO))
    with pytest.raises(Mismatch, match="'patterned': it was unloaded while it was merged"):
        engine.wait(ops[1], UnloadAdapter(ops[2], "patterned"))
    until(engine, lambda: not engine.core._desk.forms._forms)
    assert folded_layers(engine) == 0
    assert not any("+merged" in uid for uid in engine.core._desk._bank.stats().host_uids)


def test_a_form_that_is_not_the_adapter_is_not_served(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    right = SiteDelta.merged

    def flipped(self: SiteDelta, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        pair = self.low_rank
        return right(replace(self, low_rank=None if pair is None else replace(pair, scale=-pair.scale)), weight, bias)

    monkeypatch.setattr(folding.SiteDelta, "merged", flipped)
    with pytest.raises(InvalidAdapter, match="is more than rounding"):
        engine.set_resident_mode("one", MERGED)
    assert folded_layers(engine) == 0
    assert not is_merged(engine, request("one"))


def test_of_a_quantized_base_it_is_the_dequantized_one_with_the_adapter(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    wide = tiny_checkpoint(tmp_path, "llama", tie_word_embeddings=False, **sizes)
    engine = serve(wide, make_adapters(wide, tmp_path / "adapters", ("all", "vocabulary")), quantization="nf4")
    requests = [request(*names, tokens=12) for names in ((), ("all",), ("vocabulary",), ("all", "vocabulary"))]
    expected = tokens_of(engine.generate(requests))
    assert len({tuple(tokens) for tokens in expected}) == 4
    merged(engine, "all", "vocabulary")
    assert tokens_of(engine.generate(requests)) == expected
    assert is_merged(engine, request("all"))


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> TapeCapture:
    monkeypatch.setattr(engine_rank, "choose_lora", lambda name, device: TapeLora())
    monkeypatch.setattr(engine_rank, "choose_attention", lambda name, device, **_: TapeAttention())
    return TapeCapture()


def test_its_own_decode_steps_are_captured_when_they_come_and_go_with_it(
    base: Path, adapters: dict[str, Path], engine: LocalEngine, capture: TapeCapture
) -> None:
    """And those of others, or of both, are what was captured before."""
    batches = [[request("all")], [request("all"), request("all", seed=2)], [request("one")]]
    batches += [[request("all", tokens=4), request("one")]]
    expected = [tokens_of(engine.generate(batch)) for batch in batches]
    engine = serve(base, adapters, capture=capture, prefix_cache=False)
    graphs = engine.core._steps.executor.runner._graphs
    assert isinstance(graphs, DecodeGraphs)
    at_start = capture.captured
    for name in ("all", "attention", "all"):  # another one, in the same slot, has graphs of its own
        merged(engine, name)
        captured, rounds = capture.captured, 2
        for batch, tokens in list(zip(batches, expected, strict=True)) * rounds:
            before = capture.replayed
            assert tokens_of(engine.generate(batch)) == tokens
            assert capture.replayed - before == 5, "every step but the prompts'"
        assert capture.captured - captured == (2 if name == "all" else 0), "one for each batch size"
        assert len(graphs._merged) == (name == "all")
        engine.set_resident_mode(name, AUTO)
        assert not graphs._merged
    assert capture.captured == at_start + 4


def test_what_cannot_be_captured_is_launched_kernel_by_kernel(
    base: Path, adapters: dict[str, Path], engine: LocalEngine, capture: TapeCapture, caplog: pytest.LogCaptureFixture
) -> None:
    expected = tokens_of(engine.generate([request("all")]))
    engine = serve(base, adapters, capture=capture)
    merged(engine, "all")
    before, capture.refuse_at = capture.replayed, capture.captured
    assert tokens_of(engine.generate([request("all")])) == expected
    assert capture.replayed == before
    assert caplog.text.count("merged adapters run without graphs in batches of 1") == 1


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_most_of_the_traffic_turns_it_on_and_little_of_it_off(engine: LocalEngine) -> None:
    clock = Clock()
    engine.core._desk.forms._auto = AutoMerge(clock, on=True)

    def serve_for(seconds: float, *names: str) -> None:
        """Ten steps a second of one request for each name."""
        for _ in range(int(seconds * 2)):
            for name in names:
                engine.submit(request(*([name] if name else []), tokens=5))
            while not all(g.over for g in engine.generations.values()):
                engine.turn()
                clock.now += 0.1

    def on() -> list[str]:
        until(engine, lambda: not engine.core._desk.forms._jobs and not engine.core.has_work)
        return [info.name for info in engine.list_adapters() if info.merged_bytes]

    serve_for(3, "all")
    assert on() == [], "a few seconds are no reason yet"
    serve_for(5, "all")
    assert on() == ["all"]
    assert engine.get_adapter("all").resident_mode is AUTO
    assert is_merged(engine, request("all"))
    for _ in range(10):
        serve_for(1, "all")
        serve_for(1, "one")
    assert on() == ["all"], "half of the steps are enough to stay"
    serve_for(10, "all", "one")
    assert on() == [], "beside others it is of no use, however much of the traffic is its own"
    assert folded_layers(engine) == 0


def test_what_its_traffic_is_worth_puts_nobody_out(base: Path, adapters: dict[str, Path]) -> None:
    engine = serve(base, adapters, adapter_memory=120_000)
    clock = Clock()
    engine.core._desk.forms._auto = auto = AutoMerge(clock, on=True)
    uid = engine.get_adapter("all").uid
    monkey = engine.core._scheduler
    assert [engine.get_adapter(name).residency for name in SIX_ADAPTERS] == [Residency.DEVICE] * 6
    engine.submit(request("all", tokens=20))
    engine.turn()
    for _ in range(100):
        clock.now += 0.5
        auto.observe(monkey.running)
    assert auto.hot() == [uid]
    engine.run_until_idle()
    until(engine, lambda: not engine.core.has_work)
    engine.turn()
    until(engine, lambda: not engine.core._desk.forms._jobs)
    assert engine.get_adapter("all").merged_bytes == 0
    assert [engine.get_adapter(name).residency for name in SIX_ADAPTERS] == [Residency.DEVICE] * 6
    assert auto.hot() == [], "not again at once"
