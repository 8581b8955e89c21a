"""Requests that leave the choice to a router, through the engine: as if they had named what it chose."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import msgspec
import pytest

from loraplex.adapters.merging.recipe import encode
from loraplex.engine.event_stream import EventStream
from loraplex.engine.local import Generation, LocalEngine
from loraplex.engine.messages import LoadAdapter, TokenEvent
from loraplex.errors import InvalidAdapter, InvalidRequest, LoraplexError, Mismatch, NotFound
from loraplex.types import (
    AdapterRef,
    AdapterState,
    Candidate,
    ExportFormat,
    FinishReason,
    MergeInput,
    MergeOptions,
    MergeRecipe,
    OnConflict,
    Request,
    Residency,
    ResidentMode,
    Routing,
    StopRule,
)
from tests.engines import local_engine
from tests.own_text import ship_generation
from tests.ranks import ranked_engine
from tests.routers import expected, random_prototypes, write_router
from tests.small_lora import write_adapter
from tests.tiny import VOCAB_SIZE, prompt, tiny_checkpoint

NAMES = ("one", "two", "three")
PROMPTS = tuple(prompt(4 + seed, seed=seed) for seed in range(8))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("routing")
    base = tiny_checkpoint(root, "llama")
    for rank, name in enumerate(NAMES, start=1):
        write_adapter(root / "adapters" / name, base, rank)
    write_router(root / "adapters" / "router", base, random_prototypes(base, NAMES))
    write_router(root / "adapters" / "unsure", base, random_prototypes(base, NAMES), threshold=1.0)
    return root


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    return tiny_checkpoint(root, "llama")


def engine_of(root: Path, base: Path, *names: str) -> LocalEngine:
    engine = local_engine(base, adapter_dirs=(root / "adapters",), kv_page_size=4)
    for name in names:
        engine.load_adapter(name, str(root / "adapters" / name))
    return engine


def ask(ids: tuple[int, ...], *names: str | tuple[str, float], max_tokens: int = 5) -> Request:
    refs = tuple(AdapterRef(name) if isinstance(name, str) else AdapterRef(*name) for name in names)
    return Request("r", ids, refs, stop=StopRule(max_tokens=max_tokens, ignore_eos=True))


def refused(generation: Generation, error: type[LoraplexError]) -> str:
    assert generation.failure is not None, generation
    assert type(generation.failure.to_error()) is error
    return generation.failure.message


def test_a_choice_is_the_formula_and_its_tokens_are_the_chosen_ones(root: Path, base: Path) -> None:
    engine = engine_of(root, base, *NAMES, "router", "unsure")
    info = engine.get_adapter("router")
    assert (info.kind, info.state, info.residency, info.bytes) == ("router", AdapterState.READY, Residency.HOST, 0)
    assert info.router is not None
    assert info.router.adapters == NAMES
    prototypes = random_prototypes(base, NAMES)
    routed = engine.generate([ask(ids, "auto:router") for ids in PROMPTS])
    chosen = []
    for ids, one in zip(PROMPTS, routed, strict=True):
        wanted = expected(base, prototypes, ids)
        best, second = sorted(wanted, key=wanted.__getitem__, reverse=True)[:2]
        assert one.routing is not None
        assert (one.routing.router, one.routing.router_uid, one.routing.adapter) == ("router", info.uid, best)
        assert [each.name for each in one.routing.candidates] == [best, second]
        assert [each.probability for each in one.routing.candidates] == pytest.approx(
            [wanted[best], wanted[second]], abs=1e-5
        )
        assert [(each.name, each.uid) for each in one.adapters] == [(best, engine.get_adapter(best).uid)]
        chosen.append(best)
    assert len(set(chosen)) > 1
    named = engine.generate([ask(ids, name) for ids, name in zip(PROMPTS, chosen, strict=True)])
    plain = engine.generate([ask(ids) for ids in PROMPTS])
    assert [one.token_ids for one in routed] == [one.token_ids for one in named]
    assert [one.token_ids for one in routed] != [one.token_ids for one in plain]
    assert all(one.routing is None for one in (*named, *plain))
    unsure = engine.generate([ask(ids, "auto:unsure") for ids in PROMPTS])
    assert [one.token_ids for one in unsure] == [one.token_ids for one in plain]
    assert all(one.adapters == () and one.routing is not None and one.routing.adapter == "" for one in unsure)
    weighted, halved = engine.generate(
        [ask(PROMPTS[0], ("auto:router", 0.5)), ask(PROMPTS[0], (chosen[0], 0.5), max_tokens=5)]
    )
    assert weighted.token_ids == halved.token_ids
    assert weighted.adapters[0].weight == 0.5
    assert engine.get_adapter("router").last_used_at > 0
    assert all(one.in_flight == 0 for one in engine.list_adapters())


def test_ranks_choose_as_one_does(root: Path, base: Path) -> None:
    requests = [ask(ids, "auto:router") for ids in PROMPTS]
    alone = engine_of(root, base, *NAMES, "router").generate(requests)
    with ranked_engine(base, 2, adapter_dirs=(root / "adapters",), kv_page_size=4) as ranked:
        for name in (*NAMES, "router"):
            ranked.engine.load_adapter(name, str(root / "adapters" / name))
        found = ranked.engine.generate(requests)
    assert [(one.routing, one.token_ids) for one in found] == [(one.routing, one.token_ids) for one in alone]


def test_what_no_router_can_do_is_refused_by_name(root: Path, base: Path) -> None:
    engine = engine_of(root, base, "one", "router")
    asked = {
        "absent": (ask(PROMPTS[0], "auto:absent"), NotFound, "'absent' is not loaded"),
        "plain": (ask(PROMPTS[0], "auto:one"), InvalidRequest, "'one' is no router but an adapter"),
        "unrouted": (ask(PROMPTS[0], "router"), InvalidRequest, "'router' is a router, .* 'auto:router'"),
        "sum": (ask(PROMPTS[0], "one", "auto:router"), InvalidRequest, "'auto:router' stands among 2 adapters"),
        "two": (ask(PROMPTS[0], "auto:router", "auto:unsure"), InvalidRequest, "stands among 2"),
        "ids": (ask((3, VOCAB_SIZE), "auto:router"), InvalidRequest, f"prompt: token id {VOCAB_SIZE} is outside"),
    }
    found = engine.generate([request for request, _, _ in asked.values()])
    for one, (_, error, problem) in zip(found, asked.values(), strict=True):
        message = refused(one, error)
        assert _matches(problem, message), message
    with pytest.raises(InvalidRequest, match="'auto:x' begins with 'auto:'"):
        engine.load_adapter("auto:x", str(root / "adapters" / "router"))
    with pytest.raises(InvalidRequest, match="input 'router' is a router"):
        engine.merge_adapters("m", [AdapterRef("one"), AdapterRef("router")], MergeOptions("cat"))
    other = next(ids for ids in PROMPTS if _best(base, ids) != "one")
    message = refused(engine.generate([ask(other, "auto:router")])[0], NotFound)
    assert f"router 'router' chose '{_best(base, other)}'" in message
    assert "is not loaded" in message
    assert all(one.in_flight == 0 for one in engine.list_adapters())
    assert engine.core.num_sequences == 0


def test_a_router_is_not_merged_nor_served_merged_nor_exported(root: Path, base: Path, tmp_path: Path) -> None:
    engine = local_engine(base, adapter_dirs=(root / "adapters", tmp_path), export_dirs=(tmp_path,))
    shutil.copytree(root / "adapters" / "one", tmp_path / "swapped")
    for name in ("one", "router", "swapped"):
        engine.load_adapter(name, name)
    has_nothing = "'router' is a router, which has nothing to"
    for format in ExportFormat:
        with pytest.raises(InvalidRequest, match=f"{has_nothing} export") as caught:
            engine.export_adapter("router", "out", format)
        assert caught.value.field == "name"
    with pytest.raises(InvalidRequest, match=f"{has_nothing} merge") as caught:
        engine.set_resident_mode("router", ResidentMode.MERGED)
    assert caught.value.field == "resident_mode"
    uid = engine.get_adapter("router").uid
    recipe = MergeRecipe((MergeInput("r", "router", uid, 1.0),), MergeOptions("cat"))
    with pytest.raises(InvalidAdapter, match=r"merge: input 'r': .*router holds a router, and no adapter"):
        engine.load_adapter("bad", encode(recipe))
    shutil.rmtree(tmp_path / "swapped")
    shutil.copytree(root / "adapters" / "router", tmp_path / "swapped")
    with pytest.raises(InvalidAdapter, match="swapped holds a router, and no adapter"):
        engine.set_resident_mode("swapped", ResidentMode.MERGED)
    for format, problem in {ExportFormat.MERGED: "holds a router", ExportFormat.PEFT: "json is missing"}.items():
        with pytest.raises(InvalidAdapter, match=f"swapped.*{problem}"):
            engine.export_adapter("swapped", "out", format)
    assert [path.name for path in tmp_path.iterdir()] == ["swapped"]
    assert not any(one.in_flight for one in engine.list_adapters())
    assert engine.generate([ask(PROMPTS[0], "one")])[0].failure is None


def test_a_router_that_takes_a_merged_adapters_name_is_not_merged(root: Path, base: Path) -> None:
    engine = engine_of(root, base, "one")
    assert engine.set_resident_mode("one", ResidentMode.MERGED).merged_bytes > 0
    engine.load_adapter("one", str(root / "adapters" / "router"), OnConflict.REPLACE)
    op = engine.begin_op()
    source = str(root / "adapters" / "unsure")
    engine.wait(op, LoadAdapter(op, "late", source, resident_mode=ResidentMode.MERGED))  # as a supervisor does
    for _ in range(20):
        engine.turn()
    shown = [(info.kind, info.resident_mode, info.merged_bytes) for info in engine.list_adapters()]
    assert shown == [("router", ResidentMode.AUTO, 0)] * 2
    assert not engine.core._desk._bank.stats().host_uids


def test_an_adapter_that_no_base_prompt_fits_cannot_be_chosen(root: Path, base: Path) -> None:
    engine = engine_of(root, base, "router")
    best = _best(base, PROMPTS[0])
    texted = write_adapter(root / "adapters" / "texted", base, 5)
    ship_generation(texted, eos_token_id=7)
    engine.load_adapter(best, str(texted))
    assert "of its own" in refused(engine.generate([ask(PROMPTS[0], "auto:router")])[0], Mismatch)
    engine.load_adapter(best, str(root / "adapters" / "unsure"), OnConflict.REPLACE)
    assert "which is a router itself" in refused(engine.generate([ask(PROMPTS[0], "auto:router")])[0], Mismatch)


def test_a_request_waits_for_first_loads_of_router_and_chosen_one(root: Path, base: Path) -> None:
    engine = engine_of(root, base)
    for name in ("router", *NAMES):
        engine.core.handle(b"local", LoadAdapter(engine.begin_op(), name, str(root / "adapters" / name)))
    one = engine.generate([ask(PROMPTS[0], "auto:router")])[0]
    assert (one.finish, one.adapters[0].name) == (FinishReason.LENGTH, _best(base, PROMPTS[0]))


def test_unloading_and_replacing_while_requests_run(root: Path, base: Path) -> None:
    engine = engine_of(root, base, *NAMES, "router")
    best = _best(base, PROMPTS[0])
    alone = engine.generate([ask(PROMPTS[0], best, max_tokens=20)])[0].token_ids
    before = engine.get_adapter("router")
    ticket = engine.submit(ask(PROMPTS[0], "auto:router", max_tokens=20))
    for _ in range(4):
        engine.turn()
    replaced = engine.load_adapter("router", str(root / "adapters" / "unsure"), OnConflict.REPLACE)
    assert (replaced.generation, replaced.uid == before.uid) == (before.generation + 1, False)
    late = engine.submit(ask(PROMPTS[0], "auto:router"))
    engine.turn()
    assert not engine.generations[ticket].over
    assert engine.unload_adapter("router").state is AdapterState.UNLOADED
    gone = engine.submit(ask(PROMPTS[0], "auto:router"))
    engine.run_until_idle()
    assert engine.generations[ticket].token_ids == alone
    routing = engine.generations[late].routing
    assert routing is not None
    assert (routing.router_uid, routing.adapter) == (replaced.uid, "")
    assert "'router' is not loaded" in refused(engine.generations[gone], NotFound)
    assert "router" not in [one.name for one in engine.list_adapters()]
    assert not any(one.in_flight for one in engine.list_adapters())


def test_a_pinned_router_is_not_unloaded(root: Path, base: Path) -> None:
    engine = engine_of(root, base, "router")
    assert engine.pin_adapter("router", True).pinned
    with pytest.raises(Mismatch, match="pinned"):
        engine.unload_adapter("router")
    engine.pin_adapter("router", False)
    engine.unload_adapter("router")


def test_a_slow_reader_is_told_as_well() -> None:
    """Events that pile up, in this process or on their way from another, become one."""
    routing = Routing("router", "uid", "one", (Candidate("one", 0.5),))
    stream = EventStream()
    for event in (TokenEvent(1, routing=routing), TokenEvent(1, token_ids=(5,))):
        stream.put(msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=TokenEvent))
    merged = asyncio.run(stream.take())
    assert (merged.routing, merged.token_ids) == (routing, (5,))


def _best(base: Path, ids: tuple[int, ...]) -> str:
    wanted = expected(base, random_prototypes(base, NAMES), ids)
    return max(wanted, key=wanted.__getitem__)


def _matches(pattern: str, text: str) -> bool:
    import re

    return re.search(pattern, text) is not None
