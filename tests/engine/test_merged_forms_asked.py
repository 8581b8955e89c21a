"""Merged forms that somebody asks for while something else goes on: their traffic, other names, other modes."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.engine.auto_merge import AutoMerge
from loraplex.engine.local import LocalEngine
from loraplex.engine.messages import SetResidentMode
from loraplex.errors import Mismatch
from loraplex.types import AdapterRef, Request, ResidentMode, StopRule
from tests.engines import local_engine, make_adapters
from tests.tiny import prompt, tiny_checkpoint

MERGED, AUTO = ResidentMode.MERGED, ResidentMode.AUTO


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("asked"), "llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    return make_adapters(base, base.parent / "adapters", ("all", "attention", "stabilized"))


def engine_of(base: Path, adapters: dict[str, Path], *names: str, **options: object) -> LocalEngine:
    engine = local_engine(base, adapter_dirs=(base.parent,), **options)  # type: ignore[arg-type]
    for name in names:
        engine.load_adapter(name, str(adapters[name]))
    return engine


def request(name: str, tokens: int = 3) -> Request:
    return Request(name, prompt(9), (AdapterRef(name),), stop=StopRule(max_tokens=tokens, ignore_eos=True))


def is_merged(engine: LocalEngine, name: str) -> bool:
    """Whether a request is run with the merged form."""
    generation = engine.generations[engine.submit(request(name))]
    while not (engine.core._scheduler.running or generation.over):  # it may have to come to the device
        engine.turn()
    (sequence,) = engine.core._scheduler.running
    engine.run_until_idle()
    return any(uid.endswith("+merged") for uid in sequence.uids)


def held(engine: LocalEngine) -> set[str]:
    """Merged forms that take memory."""
    return {uid for uid in engine.core._desk._bank.stats().host_uids if uid.endswith("+merged")}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_one_that_its_traffic_wanted_and_others_put_out_comes_back_when_it_is_asked_for(
    base: Path, adapters: dict[str, Path]
) -> None:
    engine, clock = engine_of(base, adapters, "attention", adapter_memory=60_000), Clock()
    engine.core._desk.forms._auto = AutoMerge(clock, on=True)
    while not engine.get_adapter("attention").merged_bytes:
        engine.submit(request("attention", tokens=5))
        while not all(generation.over for generation in engine.generations.values()):
            engine.turn()
            clock.now += 0.5
    assert is_merged(engine, "attention")
    for name in ("all", "stabilized"):
        engine.load_adapter(name, str(adapters[name]))
        engine.pin_adapter(name, True)
        engine.generate([request(name)])
    assert not is_merged(engine, "attention"), "nothing had to make way"
    for name in ("all", "stabilized"):
        engine.pin_adapter(name, False)
    info = engine.set_resident_mode("attention", MERGED)
    assert (info.resident_mode, info.merged_bytes > 0) == (MERGED, True)
    assert is_merged(engine, "attention")


def test_one_that_is_given_up_and_asked_for_again_while_it_is_made(base: Path, adapters: dict[str, Path]) -> None:
    engine = engine_of(base, adapters, "all")
    first, second = engine.begin_op(), engine.begin_op()
    engine.core.handle(b"local", SetResidentMode(first, "all", MERGED))
    engine.core.handle(b"local", SetResidentMode(engine.begin_op(), "all", AUTO))
    engine.wait(second, SetResidentMode(second, "all", MERGED))
    with pytest.raises(Mismatch, match="its resident mode was set to auto while it was merged"):
        engine.wait(first, SetResidentMode(engine.begin_op(), "none", AUTO))
    assert is_merged(engine, "all")
    assert len(held(engine)) == 1
    engine.set_resident_mode("all", AUTO)
    assert not held(engine)


def test_one_that_is_pinned_is_merged_and_goes_back(base: Path, adapters: dict[str, Path]) -> None:
    engine = engine_of(base, adapters, "all")
    engine.pin_adapter("all", True)
    assert engine.set_resident_mode("all", MERGED).pinned
    assert is_merged(engine, "all")
    with pytest.raises(Mismatch, match="pinned"):
        engine.unload_adapter("all")
    assert is_merged(engine, "all"), "a refused unload took it off"
    engine.pin_adapter("all", False)
    assert is_merged(engine, "all")
    assert engine.get_adapter("all").resident_mode is MERGED
    engine.unload_adapter("all")
    assert not engine.core._desk._bank.stats().host_uids
