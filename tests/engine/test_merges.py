"""Merges in an engine: they are loads, of recipes whose inputs are read again."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loraplex.adapters.base_view import BaseView, view_of
from loraplex.adapters.delta import AdapterDelta, LowRank, SiteDelta
from loraplex.adapters.merging.read import MergeMeans, read_merged
from loraplex.adapters.merging.recipe import MAX_DEPTH, decode, encode
from loraplex.adapters.merging.team import Team
from loraplex.engine.loader import AdapterLoader, LoadJob
from loraplex.engine.local import LocalEngine
from loraplex.engine.messages import CancelExport, LoadAdapter, MergeAdapters, UnloadAdapter
from loraplex.errors import AlreadyExists, InvalidRequest, LoraplexError, Mismatch, NotFound, OverCapacity
from loraplex.types import (
    AdapterRef,
    AdapterState,
    Coverage,
    MergeInput,
    MergeOptions,
    MergeRecipe,
    OnConflict,
    Request,
    StopRule,
    UnloadMode,
)
from tests.engines import local_engine, make_adapters
from tests.tiny import load_tiny, prompt, tiny_checkpoint

CAT = MergeOptions("cat")
WEIGHTS = {"all": 0.75, "attention": -0.5}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merges")


@pytest.fixture(scope="module")
def made(root: Path) -> dict[str, Path]:
    return make_adapters(tiny_checkpoint(root, "llama"), root / "made", ("all", "attention", "one"))


@pytest.fixture
def adapters(made: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies that a test may spoil."""
    return {name: shutil.copytree(path, tmp_path / name) for name, path in made.items()}


@pytest.fixture
def engine(root: Path, adapters: dict[str, Path], tmp_path: Path) -> Iterator[LocalEngine]:
    engine = local_engine(tiny_checkpoint(root, "llama"), adapter_dirs=(tmp_path,))
    for name, path in adapters.items():
        engine.load_adapter(name, str(path))
    return engine


def refs(weights: dict[str, float] = WEIGHTS) -> tuple[AdapterRef, ...]:
    return tuple(AdapterRef(name, weight) for name, weight in weights.items())


def answer(engine: LocalEngine, *adapters: AdapterRef) -> list[int]:
    request = Request("r", prompt(9), adapters, stop=StopRule(max_tokens=12, ignore_eos=True))
    (generation,) = engine.generate([request])
    assert generation.failure is None, generation.failure
    return generation.token_ids


def refused(engine: LocalEngine, kind: type[LoraplexError], name: str = "bad", *inputs: AdapterRef) -> LoraplexError:
    """A merge that is; nothing of it is left."""
    before = engine.list_adapters()
    with pytest.raises(kind) as caught:
        engine.merge_adapters(name, inputs or refs(), CAT)
    assert engine.list_adapters() == before
    return caught.value


def test_a_merge_answers_as_the_sum_does_and_says_what_it_is(engine: LocalEngine, adapters: dict[str, Path]) -> None:
    both = engine.merge_adapters("both", refs(), CAT)
    assert answer(engine, AdapterRef("both")) == answer(engine, *refs()) != answer(engine)
    assert (both.state, both.kind, both.max_rank) == (AdapterState.READY, "merge:cat", 12)
    assert both.merge is not None
    inputs = [MergeInput(n, str(adapters[n]), engine.get_adapter(n).uid, w) for n, w in WEIGHTS.items()]
    assert both.merge.recipe == MergeRecipe(tuple(inputs), CAT) == decode(both.source)
    assert (both.merge.largest_error, both.merge.mean_error) == (0, 0)
    assert engine.get_adapter("all").merge is None
    compressed = engine.merge_adapters("less", refs(), MergeOptions("cat", svd_rank=4)).merge
    assert compressed is not None
    assert 0 < compressed.mean_error < compressed.largest_error < 1


def test_a_merge_needs_its_inputs_names_no_more(engine: LocalEngine) -> None:
    source = engine.merge_adapters("both", refs(), CAT).source
    expected = answer(engine, AdapterRef("both"))
    for name in WEIGHTS:
        engine.unload_adapter(name, UnloadMode.DRAIN)
    uid = engine.get_adapter("both").uid
    engine.unload_adapter("both")
    again = engine.load_adapter("again", source)  # as a supervisor does
    assert (again.uid, again.kind) == (uid, "merge:cat")
    assert again.merge is not None
    assert answer(engine, AdapterRef("again")) == expected


def test_a_merge_can_be_an_input_and_take_the_name_of_one(engine: LocalEngine) -> None:
    engine.merge_adapters("both", refs(), CAT)
    parts = [AdapterRef("both", 2.0), AdapterRef("one", 0.5)]
    expected = answer(engine, *parts)
    op = engine.begin_op()
    reply = engine.wait(op, MergeAdapters(op, "both", tuple(parts), CAT, on_conflict=OnConflict.REPLACE))
    assert reply.load_s > 0
    assert answer(engine, AdapterRef("both")) == expected == answer(engine, AdapterRef("both", 1.0))
    assert reply.adapters[0].generation == 2


def test_inputs_may_go_or_be_replaced_while_they_are_merged(engine: LocalEngine, adapters: dict[str, Path]) -> None:
    expected = answer(engine, *refs())
    engine.load_adapter("twin", str(adapters["all"]))
    op = engine.begin_op()
    engine.core.handle(b"local", MergeAdapters(op, "both", refs(), CAT))
    engine.core.handle(b"local", UnloadAdapter(engine.begin_op(), "all", UnloadMode.ABORT))
    engine.core.handle(
        b"local",
        LoadAdapter(engine.begin_op(), "attention", str(adapters["one"]), on_conflict=OnConflict.REPLACE),
    )
    engine.wait(op, CancelExport(-1))
    while engine.get_adapter("attention").generation < 2:
        engine.turn()
    assert answer(engine, AdapterRef("both")) == expected
    assert [info.name for info in engine.list_adapters()] == ["attention", "both", "one", "twin"]


def test_one_that_takes_the_name_of_its_input_again_and_again(engine: LocalEngine) -> None:
    """Each is a merge of the one before; who runs ends on what it began with, and a refusal changes nothing."""

    def fold_in() -> None:
        op = engine.begin_op()
        engine.wait(op, MergeAdapters(op, "all", refs({"all": 1.0, "one": 0.5}), CAT, on_conflict=OnConflict.REPLACE))

    running = Request("r", prompt(9), refs({"all": 1.0}), stop=StopRule(max_tokens=12, ignore_eos=True))
    (before,) = engine.generate([running])
    ticket = engine.submit(running)
    engine.turn()
    expected = answer(engine, *refs({"all": 1.0, "one": 0.5 * MAX_DEPTH}))
    for _ in range(MAX_DEPTH):
        fold_in()
    engine.run_until_idle()
    assert engine.generations[ticket].token_ids == before.token_ids
    assert answer(engine, AdapterRef("all")) == expected != before.token_ids
    with pytest.raises(InvalidRequest, match=f"merges of merges {MAX_DEPTH + 1} deep; allowed are {MAX_DEPTH}"):
        fold_in()
    assert engine.get_adapter("all").generation == 1 + MAX_DEPTH
    assert answer(engine, AdapterRef("all")) == expected


def test_adapters_of_another_base_are_no_inputs(engine: LocalEngine, adapters: dict[str, Path], tmp_path: Path) -> None:
    """By name they cannot be: none is loaded. Nor in a recipe, nor in the place of one that was loaded."""
    wide = tiny_checkpoint(tmp_path, "llama", hidden_size=48, intermediate_size=96)
    (other,) = make_adapters(wide, tmp_path / "other", ("one",)).values()
    with pytest.raises(Mismatch, match=r"down_proj.* \[1, 96\], .* made for another base model"):
        engine.load_adapter("other", str(other))
    assert "'other' is not loaded" in str(refused(engine, NotFound, "bad", AdapterRef("all"), AdapterRef("other")))
    ours = MergeInput("all", str(adapters["all"]), engine.get_adapter("all").uid, 1.0)
    with pytest.raises(Mismatch, match=r"merge: input 'x': .*made for another base model"):
        engine.load_adapter("bad", encode(MergeRecipe((ours, MergeInput("x", str(other), "", 1.0)), CAT)))
    shutil.copytree(other, adapters["attention"], dirs_exist_ok=True)
    error = str(refused(engine, Mismatch))
    assert "merge: input 'attention'" in error
    assert "made for another base model" in error


def test_what_is_no_longer_what_it_was_is_refused(engine: LocalEngine, adapters: dict[str, Path]) -> None:
    source = engine.merge_adapters("both", refs(), CAT).source
    shutil.copytree(adapters["one"], adapters["attention"], dirs_exist_ok=True)
    assert "'attention'" in str(error := refused(engine, Mismatch))
    assert "its files have changed since it was loaded" in str(error)
    with pytest.raises(Mismatch, match="have changed"):  # nor the recipe
        engine.load_adapter("again", source)
    shutil.rmtree(adapters["attention"])
    assert "input 'attention'" in str(error := refused(engine, NotFound))
    assert str(adapters["attention"]) in str(error)
    assert answer(engine, AdapterRef("both"))
    with pytest.raises(NotFound, match="input 'both': merge: input 'attention'"):
        engine.merge_adapters("nested", [AdapterRef("both"), AdapterRef("one")], CAT)


def test_names_are_looked_up_first(engine: LocalEngine) -> None:
    assert "did you mean attention" in str(refused(engine, NotFound, "bad", AdapterRef("attentoin")))
    assert "'one' 2 times" in str(refused(engine, InvalidRequest, "bad", AdapterRef("one"), AdapterRef("one")))
    assert "is loaded (uid" in str(refused(engine, AlreadyExists, "one"))
    assert "does not match" in str(refused(engine, InvalidRequest, "a b"))


def test_an_input_must_have_loaded(engine: LocalEngine, adapters: dict[str, Path]) -> None:
    """And a name that is taken by a merge says so."""
    op = engine.begin_op()
    engine.core.handle(b"local", LoadAdapter(op, "late", str(adapters["one"])))
    late = engine.begin_op()
    with pytest.raises(Mismatch, match="'late' is being loaded; merge it when the load has ended"):
        engine.wait(late, MergeAdapters(late, "bad", refs({"late": 1.0}), CAT))
    merge = engine.begin_op()
    engine.core.handle(b"local", MergeAdapters(merge, "both", refs(), CAT))
    with pytest.raises(AlreadyExists, match=r"being loaded from a merge of 'all' and 'attention' \(cat\)"):
        engine.load_adapter("both", str(adapters["one"]))
    while engine.get_adapter("both").state is not AdapterState.READY:
        engine.turn()


def test_a_recipe_from_outside_may_read_no_more_than_a_load(engine: LocalEngine, root: Path) -> None:
    def source(path: str, uid: str = "x") -> str:
        return encode(MergeRecipe((MergeInput("a", path, uid, 1.0),), CAT))

    for path, part in (("/etc", "lies outside the allowed directories"), ("s3://b", "is not read")):
        with pytest.raises(LoraplexError, match=part):
            engine.load_adapter("bad", source(path))
    with pytest.raises(InvalidRequest, match="truncated"):
        engine.load_adapter("bad", "merge:{")
    assert "bad" not in {info.name for info in engine.list_adapters()}


def test_inputs_that_are_too_large_together_are_not_all_read() -> None:
    low_rank = LowRank(torch.ones(2, 8), torch.ones(8, 2), 1.0)
    read: list[str] = []

    def load(source: str) -> AdapterDelta:
        read.append(source)
        return AdapterDelta(source, "lora", {"q": SiteDelta(low_rank)}, Coverage({}, {}))

    base = BaseView((), torch.float32, weight=lambda site: low_rank.a, bias=lambda site: None, tied=False, vocab_size=9)
    source = encode(MergeRecipe(tuple(MergeInput(name, name, name, 1.0) for name in "abc"), CAT))
    with pytest.raises(OverCapacity, match=r"inputs take 256 bytes; at most 200 are allowed \(max_adapter_bytes\)"):
        read_merged(source, MergeMeans(load, base, 200, lambda: None, Team()))
    assert read == ["a", "b"]


def test_a_result_that_is_too_large_ends_at_the_site_that_is(root: Path) -> None:
    """Factors of the rank that is asked for are larger than the inputs'."""
    model = load_tiny(tiny_checkpoint(root, "llama"))
    base = view_of(model)
    low_rank = LowRank(torch.randn(1, 32), torch.randn(32, 1), 1.0)
    sites = {site.name: SiteDelta(low_rank) for site in base.sites if (site.in_features, site.out_features) == (32, 32)}
    pieces: list[None] = []

    def load(source: str) -> AdapterDelta:
        return AdapterDelta(source, "lora", sites, Coverage({}, {}))

    recipe = MergeRecipe((MergeInput("a", "a", "a", 1.0),), MergeOptions("ties_svd", 0.5, svd_rank=30))
    size = 30 * (32 + 32) * 4
    with pytest.raises(OverCapacity, match=rf"result takes {2 * size} bytes; at most {2 * size - 1} are allowed"):
        read_merged(encode(recipe), MergeMeans(load, base, 2 * size - 1, lambda: pieces.append(None), Team()))
    assert len(sites) > 2
    assert len(pieces) == 2  # before the input, and after the first site


@pytest.mark.parametrize("busy", [True, False])
def test_long_work_rests_three_times_as_long_as_it_has_worked_while_sequences_run(busy: bool) -> None:
    """And a load that comes while it rests is done at once."""
    piece_s, rests, done = 0.05, [], threading.Event()
    order: list[str] = []

    def load(job: LoadJob) -> None:  # type: ignore[return]
        if not job.is_long:
            order.append(job.name)
            return
        for _ in range(4):
            time.sleep(piece_s)
            if len(rests) == 1:
                loader.submit(LoadJob(1, "x", "/x"))
            start = time.monotonic()
            job.give_way()
            rests.append(time.monotonic() - start)
        order.append(job.name)
        done.set()

    loader = AdapterLoader(load, lambda: None, Team(lambda: busy))  # type: ignore[arg-type]
    loader.submit(LoadJob(0, "merge", encode(MergeRecipe((MergeInput("a", "/a", "", 1.0),), CAT))))
    assert done.wait(10)
    loader.close()
    assert order == ["x", "merge"]
    assert (min(rests) >= 2.7 * piece_s) is busy


def test_loads_go_between_the_pieces_of_a_merge() -> None:
    """Two merges and three loads: the second merge waits for the first, the loads for neither."""
    began, done = threading.Event(), threading.Event()
    order: list[str] = []

    def load(job: LoadJob) -> None:  # type: ignore[return]
        order.append(f"{job.name} begins")
        if job.name == "first":
            began.set()
            assert done.wait(10)
        job.give_way()
        order.append(f"{job.name} ends")

    loader = AdapterLoader(load, lambda: None, Team(lambda: False))  # type: ignore[arg-type]
    recipe = encode(MergeRecipe((MergeInput("a", "/a", "", 1.0),), CAT))
    loader.submit(LoadJob(0, "first", recipe))
    assert began.wait(10)
    for key, (name, source) in enumerate([("x", "/x"), ("second", recipe), ("y", "/y")], start=1):
        loader.submit(LoadJob(key, name, source))
    done.set()
    results = []
    while len(results) < 4:
        results += loader.take_results()
    ran = [f"{name} {what}" for name in ("x", "y") for what in ("begins", "ends")]
    assert order == ["first begins", *ran, "first ends", "second begins", "second ends"]
    assert [result.job.key for result in results] == [1, 3, 0, 2]
