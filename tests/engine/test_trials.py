"""From files to being served: an adapter is uploaded, probed with no step in flight, and only then has its name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.adapters.facts import AdapterFacts
from loraplex.engine import build
from loraplex.engine.local import Generation, LocalEngine
from loraplex.engine.messages import LoadAdapter
from loraplex.engine.probe import Pieces, Prober
from loraplex.errors import InternalError, InvalidAdapter, LoraplexError
from loraplex.layers.rows import Rows
from loraplex.types import AdapterRef, AdapterState, FinishReason, OnConflict, Probe, Request, Residency, StopRule
from tests.engines import local_engine
from tests.made_adapters import DOWN, Make, loads, made
from tests.streams import MODES
from tests.tiny import LAYERS, prompt, tiny_checkpoint

#: 2 x (48 + 32) numbers of float32
BYTES = 2 * (48 + 32) * 4
FAINT = SiteDelta(LowRank(torch.full((1, 48), 1e-30), torch.full((32, 1), 1e-6), 1.0))


@dataclass
class Watch:
    """What the engine's prober was asked, and by whom."""

    uids: list[str] = field(default_factory=list)
    #: called before each probe
    before: Callable[[], None] = lambda: None


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    seen = Watch()

    class WatchedProber(Prober):
        def pieces(self, slot: int, facts: AdapterFacts) -> Pieces[Probe]:
            seen.uids.append(facts.uid)
            seen.before()
            return super().pieces(slot, facts)

    monkeypatch.setattr(build, "Prober", WatchedProber)
    return seen


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.getbasetemp(), "llama", tie_word_embeddings=False)


def serve(base: Path, adapters: dict[str, Make], *, room: int = 64, **settings: object) -> LocalEngine:
    """An engine with adapter memory for ``room`` plain adapters, which loads by the names of ``adapters``."""
    options = {"kv_page_size": 4, "adapter_memory": room * BYTES, **settings}
    return local_engine(base, make_load=loads(adapters), **options)


def request(*names: str, tokens: int = 6, seed: int = 1) -> Request:
    refs = tuple(AdapterRef(name) for name in names)
    return Request(f"r-{names}", prompt(5, seed), refs, stop=StopRule(max_tokens=tokens, ignore_eos=True))


def device_bytes(engine: LocalEngine) -> int:
    return engine.core._desk.gauges((), ()).device_bytes


def holds_nothing(engine: LocalEngine) -> bool:
    """Neither on the device nor on the host, and no slot of any table."""
    gauges = engine.core._desk.gauges((), ())
    held = [ref.rows.held for ref in engine.core._steps.executor.runner.model.tables().values()]
    return (gauges.device_bytes, gauges.host_bytes, any(held), engine.core.has_work) == (0, 0, False, False)


def begin_load(engine: LocalEngine, name: str, source: str) -> None:
    engine.core.handle(b"other", LoadAdapter(engine.begin_op(), name, source))


def until_read(engine: LocalEngine, count: int) -> None:
    """Wait for the loader's thread, and give the engine no turn."""
    deadline = time.monotonic() + 30
    while engine.core._desk._loader._results.qsize() < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def turn_until(engine: LocalEngine, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        engine.turn()


def test_what_it_does_is_told_with_it(base: Path, watch: Watch) -> None:
    engine = serve(base, {"a": made("a")})
    info = engine.load_adapter("a", "a")
    assert info.probe is not None
    assert info.probe.max_change > 0
    assert 0 <= info.probe.top_changed <= 1
    assert engine.get_adapter("a").probe == info.probe
    assert (info.residency, info.state) == (Residency.DEVICE, AdapterState.READY)


def test_the_seconds_of_a_load_are_those_until_it_is_served(base: Path, watch: Watch) -> None:
    engine = serve(base, {"a": made("a")})
    watch.before = lambda: time.sleep(0.2)
    op = engine.begin_op()
    assert engine.wait(op, LoadAdapter(op, "a", "a")).load_s > 0.2


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (made("faint", {DOWN: FAINT}), InvalidAdapter, "changes nothing"),
        (
            made("huge", {DOWN: SiteDelta(LowRank(torch.full((1, 48), 1e30), torch.full((32, 1), 1e30), 1.0))}),
            InvalidAdapter,
            "non-finite",
        ),
    ],
)
def test_a_failed_probe_leaves_nothing_behind(base: Path, bad: Make, error: type[LoraplexError], words: str) -> None:
    engine = serve(base, {"bad": bad})
    begin_load(engine, "bad", "bad")
    parked = engine.generations[engine.submit(request("bad"))]
    engine.run_until_idle()
    assert parked.failure is not None
    assert parked.failure.error == "NotFound"
    with pytest.raises(error, match=words):
        engine.load_adapter("bad", "bad")
    assert engine.list_adapters() == ()
    assert holds_nothing(engine)
    with pytest.raises(error, match=words):
        engine.load_adapter("bad", "bad")


def test_a_probe_that_raises_fails_its_load_alone(base: Path, watch: Watch) -> None:
    engine = serve(base, {"a": made("a"), "b": made("b")})
    engine.load_adapter("a", "a")

    def fail() -> None:
        raise RuntimeError("out of memory")

    watch.before = fail
    with pytest.raises(InternalError, match="adapter b: its probe failed: RuntimeError: out of memory"):
        engine.load_adapter("b", "b")
    assert engine.generate([request("a")])[0].finish is FinishReason.LENGTH
    assert device_bytes(engine) == BYTES
    watch.before = lambda: None
    assert engine.load_adapter("b", "b").state is AdapterState.READY


def test_a_version_serves_until_its_successor_has_passed(base: Path) -> None:
    engine = serve(base, {"old": made("old"), "bad": made("bad", {DOWN: FAINT}), "new": made("new")})
    engine.load_adapter("a", "old")
    before = engine.generate([request("a")])[0]
    with pytest.raises(InvalidAdapter, match="changes nothing"):
        engine.load_adapter("a", "bad", OnConflict.REPLACE)
    assert engine.get_adapter("a").uid == "old"
    assert engine.generate([request("a")])[0].token_ids == before.token_ids
    assert engine.load_adapter("a", "new", OnConflict.REPLACE).uid == "new"
    assert engine.generate([request("a")])[0].token_ids != before.token_ids
    engine.unload_adapter("a")
    assert holds_nothing(engine)


def test_one_content_is_probed_once(base: Path, watch: Watch) -> None:
    engine = serve(base, {"a": made("same"), "b": made("same"), "bad": made("bad", {DOWN: FAINT})})
    for name in ("one", "two"):
        begin_load(engine, name, "a")
    turn_until(engine, lambda: all(info.state is AdapterState.READY for info in engine.list_adapters()))
    assert engine.load_adapter("three", "b").probe == engine.get_adapter("one").probe
    assert engine.get_adapter("one").probe is not None
    assert watch.uids == ["same"]
    assert device_bytes(engine) == BYTES
    assert set(engine.core._desk.gauges((), ()).on_device) == {"one", "two", "three"}
    for name in ("one", "two", "three"):
        engine.unload_adapter(name)
    for name in ("four", "five"):
        begin_load(engine, name, "bad")
    turn_until(engine, lambda: not engine.list_adapters())
    assert holds_nothing(engine)
    engine.load_adapter("one", "a")
    assert watch.uids.count("same") == 2, "forgotten, so tried anew"


def test_idle_adapters_make_room_for_the_next_to_be_tried(base: Path) -> None:
    adapters = {name: made(name) for name in "abc"}
    engine = serve(base, adapters, room=2)
    for name in adapters:
        assert engine.load_adapter(name, name).residency is Residency.DEVICE
    assert engine.get_adapter("a").residency is Residency.HOST
    assert device_bytes(engine) == 2 * BYTES


def test_where_there_is_no_room_one_is_tried_beyond_the_budget_and_taken_off(base: Path, watch: Watch) -> None:
    adapters = {name: made(name) for name in "abcdef"}
    engine = serve(base, adapters, room=2)
    for name in "ab":
        engine.load_adapter(name, name)
    alone = engine.generate([request("a", tokens=60), request("b", tokens=60)])
    running = [engine.generations[engine.submit(request(name, tokens=60))] for name in "ab"]
    engine.turn()
    watch.before = lambda: seen.append(device_bytes(engine))
    seen: list[int] = []
    for name in "cdef":
        begin_load(engine, name, name)
    until_read(engine, 4)  # the loader's thread may take longer than both run
    most = [device_bytes(engine)]

    def tried() -> bool:
        most.append(device_bytes(engine))
        return len(watch.uids) == len(adapters)

    turn_until(engine, tried)
    assert not any(generation.over for generation in running)
    turn_until(engine, lambda: not engine.core._desk.has_trial)
    assert max(most) <= 3 * BYTES, "one at a time"
    assert seen == [3 * BYTES] * 4
    assert device_bytes(engine) == 2 * BYTES
    assert [engine.get_adapter(name).residency for name in "abcdef"] == [Residency.DEVICE] * 2 + [Residency.HOST] * 4
    engine.run_until_idle()
    assert [g.token_ids for g in running] == [g.token_ids for g in alone]
    assert engine.generate([request("f")])[0].finish is FinishReason.LENGTH


@pytest.mark.parametrize("running", ["", "r"])
def test_loads_that_follow_each_other_do_not_keep_a_request_waiting(base: Path, watch: Watch, running: str) -> None:
    """Its adapters have to come back to the device, which has room for them and whatever runs, and for no other."""
    loading = [f"n{index}" for index in range(20)]
    engine = serve(base, {name: made(name) for name in ["a", "b", "r", *loading]}, room=2)
    names = "a" if running else "ab"
    for name in [*names, *loading[:2], *running]:
        engine.load_adapter(name, name)
    for name in running:
        engine.submit(request(name, tokens=80))
        engine.turn()
    for name in loading[2:]:
        begin_load(engine, name, name)
    until_read(engine, len(loading[2:]))
    tried = len(watch.uids)
    refs = tuple(AdapterRef(name, 0.5) for name in names)
    waiting = engine.generations[engine.submit(replace(request(tokens=1), adapters=refs))]
    turn_until(engine, lambda: waiting.over)
    assert waiting.finish is FinishReason.LENGTH
    assert len(watch.uids) - tried <= 2
    engine.run_until_idle()
    turn_until(engine, lambda: all(info.state is AdapterState.READY for info in engine.list_adapters()))
    assert device_bytes(engine) <= 2 * BYTES


@pytest.mark.parametrize("mode", MODES)
def test_streams_go_on_beside_probes_and_no_step_is_in_flight_then(base: Path, watch: Watch, mode: str) -> None:
    adapters = {name: made(name) for name in "abcdefgh"}
    engine = serve(base, adapters, mode=mode)
    engine.load_adapter("a", "a")
    asked = [request("a", tokens=40), request(tokens=40, seed=2)]
    alone = engine.generate(asked)
    flying: list[object] = []
    watch.before = lambda: flying.append(engine.core._steps._flying)
    tickets = [engine.submit(one) for one in asked]
    for name in "bcdefgh":
        begin_load(engine, name, name)
    probes: list[int] = []
    while len(watch.uids) < len(adapters):
        tried = len(watch.uids)
        engine.turn()
        probes.append(len(watch.uids) - tried)
    assert max(probes) == 1, "one small step between two of the streams'"
    assert not any(engine.generations[ticket].over for ticket in tickets)
    engine.run_until_idle()
    assert [engine.generations[ticket].token_ids for ticket in tickets] == [g.token_ids for g in alone]
    assert flying == [None] * 7
    assert all(generation.finish is FinishReason.LENGTH for generation in ask_each(engine, "abcdefgh"))


def ask_each(engine: LocalEngine, names: str) -> list[Generation]:
    return engine.generate([request(name) for name in names])


def test_content_that_two_adapters_have_is_there_once(base: Path) -> None:
    head = SiteDelta(rows=Rows(torch.randn(96, 32, generator=torch.Generator().manual_seed(1))))
    sites = {"a": {"lm_head": head}, "b": {"lm_head": head, DOWN: plain()}}
    engine = serve(base, {name: made(name, own) for name, own in sites.items()})
    first = engine.load_adapter("a", "a")
    assert device_bytes(engine) == first.bytes >= 96 * 32 * 4
    second = engine.load_adapter("b", "b")
    assert second.bytes > first.bytes
    assert device_bytes(engine) == second.bytes
    both = ask_each(engine, "ab")
    assert both[0].token_ids != both[1].token_ids
    engine.unload_adapter("a")
    assert device_bytes(engine) == second.bytes
    assert engine.generate([request("b")])[0].token_ids == both[1].token_ids
    engine.unload_adapter("b")
    assert holds_nothing(engine)


def plain() -> SiteDelta:
    return SiteDelta(LowRank(torch.ones(1, 48), torch.linspace(-1, 1, 32).unsqueeze(1), 0.1))


def test_an_adapter_of_norms_alone_has_a_slot_that_steps_know(base: Path) -> None:
    norm = SiteDelta(rows=Rows(torch.linspace(-2, 2, 32)))
    engine = serve(base, {"norm": made("norm", {"model.norm": norm})})
    info = engine.load_adapter("norm", "norm")
    assert info.probe is not None
    assert info.probe.max_change > 0
    with_it, without = engine.generate([request("norm"), request()])
    assert with_it.finish is FinishReason.LENGTH
    assert with_it.token_ids != without.token_ids
    engine.unload_adapter("norm")
    assert holds_nothing(engine)


def test_steps_run_between_the_pieces_of_a_probe(base: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PROBE_SLICE_S", 0.0)
    engine = serve(base, {"a": made("a")})
    alone = engine.generate([request(tokens=40)])[0].token_ids
    lengths: list[int] = []
    running = engine.generations[engine.submit(request(tokens=40))]
    watch.before = lambda: lengths.append(len(running.token_ids))
    while len(running.token_ids) < 3:
        engine.turn()
    engine.load_adapter("a", "a")
    assert len(lengths) == 1
    assert len(running.token_ids) - lengths[0] >= LAYERS
    engine.run_until_idle()
    assert running.token_ids == alone
