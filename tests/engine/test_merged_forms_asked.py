"""Merged forms that somebody asks for while something else goes on: their traffic, other names, other modes."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from peft import LNTuningConfig, LoraConfig

from loraplex.adapters.base_view import view_of
from loraplex.adapters.folding import fold_sites
from loraplex.adapters.load import load_adapter
from loraplex.adapters.reading.source import any_directory
from loraplex.engine.auto_merge import AutoMerge
from loraplex.engine.local import LocalEngine
from loraplex.engine.messages import PinAdapter, SetResidentMode
from loraplex.errors import Mismatch
from loraplex.types import AdapterRef, Request, Residency, StopRule
from tests.engines import local_engine, make_adapters
from tests.held import held_bytes
from tests.merged_forms import AUTO, MERGED, Clock
from tests.peft_kinds import Recipe, save
from tests.ranks import ranked_engine
from tests.servers import until
from tests.tiny import load_tiny, prompt, tiny_checkpoint

OTHERS = ("all", "stabilized", "patterned", "vocabulary")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("asked"), "llama", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    return make_adapters(base, base.parent / "adapters", ("attention", *OTHERS))


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


def live_bytes() -> int:
    """Of all tensors of this process, which has all ranks."""
    gc.collect()
    return held_bytes([found for found in gc.get_objects() if type(found) is torch.Tensor])


def held(engine: LocalEngine) -> set[str]:
    """Merged forms that take memory."""
    return {uid for uid in engine.core._desk._bank.stats().host_uids if uid.endswith("+merged")}


def merged_by_traffic(engine: LocalEngine, name: str) -> None:
    """Serve one adapter until its traffic has it merged; then time stands still."""
    clock = Clock()
    engine.core._desk.forms._auto = AutoMerge(clock, on=True)
    while not engine.get_adapter(name).merged_bytes:
        engine.submit(request(name, tokens=5))
        while not all(generation.over for generation in engine.generations.values()):
            engine.turn()
            clock.now += 0.5
    assert is_merged(engine, name)


def crowd(engine: LocalEngine, adapters: dict[str, Path]) -> None:
    """Two more adapters that are to be on the device; what is not pinned makes way."""
    for name in ("all", "stabilized"):
        engine.load_adapter(name, str(adapters[name]))
        engine.pin_adapter(name, True)
        engine.generate([request(name)])


def test_one_that_its_traffic_wanted_and_others_put_out_comes_back_when_it_is_asked_for(
    base: Path, adapters: dict[str, Path]
) -> None:
    engine = engine_of(base, adapters, "attention", adapter_memory=60_000)
    merged_by_traffic(engine, "attention")
    crowd(engine, adapters)
    assert not is_merged(engine, "attention"), "nothing had to make way"
    for name in ("all", "stabilized"):
        engine.pin_adapter(name, False)
    info = engine.set_resident_mode("attention", MERGED)
    assert (info.resident_mode, info.merged_bytes > 0) == (MERGED, True)
    assert is_merged(engine, "attention")


def test_one_that_only_traffic_wants_again_makes_way_again(base: Path, adapters: dict[str, Path]) -> None:
    """Asked for under one name and given up there, while its traffic has it under another."""
    engine = engine_of(base, adapters, "attention", adapter_memory=60_000)
    engine.load_adapter("twin", str(adapters["attention"]))
    merged_by_traffic(engine, "twin")
    engine.set_resident_mode("attention", MERGED)
    engine.set_resident_mode("attention", AUTO)
    assert is_merged(engine, "twin")
    crowd(engine, adapters)
    assert not is_merged(engine, "twin")


def waiting_for_one_that_made_way(base: Path, adapters: dict[str, Path]) -> tuple[LocalEngine, int]:
    """A request that was given a form which its traffic wanted, and has not begun, while others have put that out."""
    engine = engine_of(base, adapters, "attention", "all", "stabilized", adapter_memory=77_000)
    merged_by_traffic(engine, "attention")
    engine.pin_adapter("attention", True)
    for name in ("patterned", "vocabulary"):  # they put out what is no form
        engine.load_adapter(name, str(adapters[name]))
    (form,), bank = held(engine), engine.core._desk._bank
    assert bank.residency(form) is Residency.DEVICE
    others = [engine.get_adapter(name).uid for name in OTHERS]  # which turns the engine
    ticket = engine.submit(request("attention"))
    until(lambda: bank.advance(1.0) is not None and bank.ensure(others) is not None)
    assert bank.residency(form) is Residency.HOST
    return engine, ticket


def test_whoever_waits_is_served_by_the_adapter_itself_where_the_form_made_way(
    base: Path, adapters: dict[str, Path]
) -> None:
    engine, ticket = waiting_for_one_that_made_way(base, adapters)
    for name in OTHERS:  # now there is no room for the form
        engine.core.handle(b"local", PinAdapter(engine.begin_op(), name, True))
    engine.run_until_idle()
    waited = engine.generations[ticket]
    assert waited.failure is None
    assert engine.generate([request("attention")])[0].token_ids == waited.token_ids


@pytest.mark.parametrize("asked_again", [False, True])
def test_one_that_made_way_and_is_asked_for_and_given_up_before_it_is_back(
    base: Path, adapters: dict[str, Path], asked_again: bool
) -> None:
    engine, ticket = waiting_for_one_that_made_way(base, adapters)
    for mode in (MERGED, AUTO):
        engine.core.handle(b"local", SetResidentMode(engine.begin_op(), "attention", mode))
    if asked_again:
        assert engine.set_resident_mode("attention", MERGED).merged_bytes > 0
        assert is_merged(engine, "attention")
    engine.run_until_idle()
    assert engine.generations[ticket].failure is None
    assert bool(held(engine)) is asked_again


def test_one_of_which_nothing_can_be_merged_is_tried_once(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(Recipe(lambda: LNTuningConfig(target_modules=["input_layernorm"])), base, base.parent / "norms", seed=5)
    engine, clock = local_engine(base, adapter_dirs=(base.parent,)), Clock()
    engine.load_adapter("norms", str(path))
    engine.core._desk.forms._auto = AutoMerge(clock, on=True)
    for _ in range(30):
        engine.submit(request("norms", tokens=5))
        engine.run_until_idle()
        until(lambda: not engine.core._desk.forms._jobs or bool(engine.turn()))
        clock.now += 5.0
    assert caplog.text.count("adapter norms is not served merged") == 1


def test_a_head_keeps_what_is_added_to_its_outputs(base: Path) -> None:
    recipe = Recipe(lambda: LoraConfig(r=2, target_modules=["lm_head"], lora_bias=True))
    path = save(recipe, base, base.parent / "head", seed=5)
    engine = local_engine(base, adapter_dirs=(base.parent,))
    engine.load_adapter("head", str(path))
    [apart] = engine.generate([request("head", tokens=8)])
    engine.set_resident_mode("head", MERGED)
    assert is_merged(engine, "head")
    [merged] = engine.generate([request("head", tokens=8)])
    assert merged.token_ids == apart.token_ids


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


def test_what_was_made_for_nobody_is_kept_on_no_rank(base: Path, adapters: dict[str, Path]) -> None:
    with ranked_engine(base, 2, adapter_dirs=(base.parent,)) as ranked:
        engine = ranked.engine
        engine.load_adapter("all", str(adapters["all"]))
        before = live_bytes()
        engine.core.handle(b"local", SetResidentMode(engine.begin_op(), "all", MERGED))
        engine.set_resident_mode("all", AUTO)
        while engine.core._desk.forms._forms:
            engine.turn()
        engine.generate([request("all")])  # the others are told with the next order
        until(lambda: live_bytes() < before + 1000)  # a form is some ten thousand
        assert engine.set_resident_mode("all", MERGED).merged_bytes > 10_000


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


def test_loads_go_in_between_two_layers_of_one_that_is_made(base: Path, adapters: dict[str, Path]) -> None:
    model = load_tiny(base)
    sites = load_adapter(any_directory(str(adapters["attention"])), view_of(model), max_bytes=1 << 20).sites
    given: list[None] = []
    writes = fold_sites("uid", sites, sites, model.tables(), view_of(model), lambda: given.append(None))
    assert len(given) == len(writes) == 4  # q, k and v are one layer, o another, of two blocks
