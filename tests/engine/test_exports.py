"""Exports beside everything else that an engine does: what they hold, what ends them, and what goes on meanwhile."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from loraplex.adapters.exporting import export as exporting
from loraplex.adapters.reading.source import AdapterDir
from loraplex.engine.local import LocalEngine
from loraplex.engine.messages import CancelExport, ExportAdapter, LoadAdapter, MergeAdapters, ToEngine, UnloadAdapter
from loraplex.errors import (
    AlreadyExists,
    InvalidAdapter,
    InvalidRequest,
    LoraplexError,
    Mismatch,
    NotFound,
    NotPermitted,
    OverCapacity,
    RequestCancelled,
)
from loraplex.types import (
    AdapterRef,
    AdapterState,
    ExportFormat,
    MergeOptions,
    OnConflict,
    Request,
    ResidentMode,
    StopRule,
    UnloadMode,
)
from tests.engines import local_engine, make_adapters
from tests.servers import until
from tests.tiny import prompt, tiny_checkpoint

ME = b"local"
OTHER = b"other"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.getbasetemp(), "llama")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_adapters(base, tmp_path_factory.mktemp("adapters"), ("all", "one"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "exports"
    path.mkdir()
    return path


@pytest.fixture
def engine(base: Path, adapters: dict[str, Path], tmp_path: Path, out: Path) -> Iterator[LocalEngine]:
    engine = local_engine(base, adapter_dirs=(tmp_path, adapters["one"].parent), export_dirs=(out,))
    for name, path in adapters.items():
        engine.load_adapter(name, str(path))
    yield engine
    engine.core.close()


class Gate:
    """Lets tensors be written one at a time. ``reached`` counts those that were come to."""

    def __init__(self, write: Callable[..., None]) -> None:
        self._write = write
        self._open = threading.Semaphore(0)
        self.reached = 0

    def __call__(self, *args: object) -> None:
        self.reached += 1
        assert self._open.acquire(timeout=30)
        self._write(*args)

    def has_reached(self, count: int) -> bool:
        return self.reached == count

    def let(self, count: int) -> None:
        self._open.release(count)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate(exporting.write_tensor)
    monkeypatch.setattr(exporting, "write_tensor", gate)
    return gate


def begin(engine: LocalEngine, name: str = "all", destination: str = "model", frontend: bytes = ME) -> int:
    op = engine.begin_op()
    engine.core.handle(frontend, ExportAdapter(op, name, destination, ExportFormat.MERGED))
    return op


def ended(engine: LocalEngine, op: int) -> None:
    """Turn until an operation that was begun is over; raises what it failed with."""
    engine.wait(op, CancelExport(-1))


def turn_until(engine: LocalEngine, true: Callable[[], bool]) -> None:
    def step() -> bool:
        engine.turn()
        return true()

    until(step)


def come_to(engine: LocalEngine, gate: Gate, count: int) -> None:
    """Stand before the first tensor of an export, or a later one."""
    for reached in range(1, count + 1):
        if reached > 1:
            gate.let(1)
        turn_until(engine, partial(gate.has_reached, reached))


def test_an_export_is_told_in_bytes_and_held_until_its_end(engine: LocalEngine, out: Path, gate: Gate) -> None:
    op = begin(engine)
    come_to(engine, gate, 1)
    assert engine.get_adapter("all").in_flight == 1
    unload = engine.begin_op()
    engine.core.handle(ME, UnloadAdapter(unload, "all", UnloadMode.DRAIN))
    assert engine.get_adapter("all").state is AdapterState.DRAINING
    gate.let(100)
    ended(engine, op)
    turn_until(engine, lambda: [each.name for each in engine.list_adapters()] == ["one"])
    assert engine.wait(unload, CancelExport(-1)).adapters[0].state is AdapterState.UNLOADED
    with pytest.raises(NotFound):
        engine.get_adapter("all")
    done = [each.done_bytes for each in engine.exporting]
    assert engine.exporting[0].stage == "reading the adapter"
    assert engine.exporting[-1].stage == "done"
    assert done == sorted(done)
    assert done[-1] == engine.exporting[-1].total_bytes > 0
    assert {each.destination for each in engine.exporting} == {str(out / "model")}
    assert len(done) > 20  # a piece a tensor
    assert [path.name for path in out.iterdir()] == ["model"]


def test_loads_merges_and_requests_go_on_between_the_pieces(
    engine: LocalEngine, gate: Gate, adapters: dict[str, Path]
) -> None:
    op = begin(engine)
    load = LoadAdapter(engine.begin_op(), "again", str(adapters["one"]))
    refs = (AdapterRef("all", 0.5), AdapterRef("one", 0.5))
    for reached, message in enumerate((load, MergeAdapters(engine.begin_op(), "both", refs, MergeOptions("cat"))), 1):
        turn_until(engine, partial(gate.has_reached, reached))
        engine.core.handle(ME, message)
        gate.let(1)
        ended(engine, message.op)
        assert gate.reached <= reached + 1
    request = Request("r", prompt(5), adapters=(AdapterRef("both"),), stop=StopRule(max_tokens=3, ignore_eos=True))
    assert len(engine.generate([request])[0].token_ids) == 3
    assert gate.reached <= 3
    gate.let(100)
    ended(engine, op)


@pytest.mark.parametrize("how", ["cancel", "abort", "front end", "close"])
def test_one_that_is_not_wanted_any_more_leaves_nothing(engine: LocalEngine, out: Path, gate: Gate, how: str) -> None:
    op = begin(engine, frontend=OTHER if how == "front end" else ME)
    come_to(engine, gate, 3)
    assert [path.name for path in out.iterdir()] == ["model.partial"]
    match how:
        case "cancel":
            engine.core.handle(ME, CancelExport(op))
        case "abort":
            engine.core.handle(ME, UnloadAdapter(engine.begin_op(), "all", UnloadMode.ABORT))
        case "front end":
            engine.core.drop_frontend(OTHER)
    gate.let(1)
    if how == "close":
        engine.core.close()
    elif how == "front end":
        turn_until(engine, lambda: engine.get_adapter("all").in_flight == 0)
    else:
        with pytest.raises(RequestCancelled, match="nothing of it was kept"):
            ended(engine, op)
    assert not list(out.iterdir())
    assert gate.reached < 8


def test_others_cannot_cancel_it_nor_does_an_unload_that_is_refused(engine: LocalEngine, out: Path, gate: Gate) -> None:
    op = begin(engine)
    come_to(engine, gate, 1)
    engine.core.handle(OTHER, CancelExport(op))
    engine.core.handle(ME, CancelExport(op + 1000))
    engine.pin_adapter("all", True)
    with pytest.raises(Mismatch, match="'all' is pinned"):
        engine.unload_adapter("all", UnloadMode.ABORT)
    gate.let(100)
    ended(engine, op)
    assert (out / "model" / "config.json").is_file()


def test_one_of_a_version_that_was_replaced_is_not_ended_by_an_unload_of_the_next(
    engine: LocalEngine, out: Path, gate: Gate, adapters: dict[str, Path]
) -> None:
    op = begin(engine)
    come_to(engine, gate, 1)
    load = LoadAdapter(engine.begin_op(), "all", str(adapters["one"]), pinned=True, on_conflict=OnConflict.REPLACE)
    engine.core.handle(ME, load)
    gate.let(1)
    ended(engine, load.op)
    with pytest.raises(Mismatch, match="'all' is pinned"):
        engine.unload_adapter("all", UnloadMode.ABORT)
    engine.pin_adapter("all", False)
    engine.unload_adapter("all", UnloadMode.ABORT)
    gate.let(1000)
    ended(engine, op)
    assert (out / "model" / "config.json").is_file()


def test_exports_run_one_after_the_other_and_no_more_than_eight_wait(
    engine: LocalEngine, out: Path, gate: Gate
) -> None:
    ops = [begin(engine, destination=f"model-{number}") for number in range(8)]
    come_to(engine, gate, 1)
    with pytest.raises(OverCapacity, match="8 exports run or wait already; allowed are 8"):
        ended(engine, begin(engine, destination="model-9"))
    assert [path.name for path in out.iterdir()] == ["model-0.partial"]
    engine.core.handle(ME, CancelExport(ops[3]))
    gate.let(1000)
    with pytest.raises(RequestCancelled):
        ended(engine, ops.pop(3))
    for op in ops:
        ended(engine, op)
    assert sorted(path.name for path in out.iterdir()) == [f"model-{n}" for n in (0, 1, 2, 4, 5, 6, 7)]
    assert engine.get_adapter("all").in_flight == 0


def files(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


@pytest.mark.parametrize("format", list(ExportFormat))
def test_of_two_to_one_destination_the_first_is_there_and_the_second_refused(
    engine: LocalEngine, out: Path, format: ExportFormat
) -> None:
    ops = [engine.begin_op(), engine.begin_op()]
    for op, name in zip(ops, ("all", "one"), strict=True):
        engine.core.handle(ME, ExportAdapter(op, name, "model", format))
    ended(engine, ops[0])
    with pytest.raises(AlreadyExists, match="overwrite nothing"):
        ended(engine, ops[1])
    engine.export_adapter("all", "again", format)
    assert files(out / "model") == files(out / "again")
    assert sorted(path.name for path in out.iterdir()) == ["again", "model"]
    assert [each.in_flight for each in engine.list_adapters()] == [0, 0]


def test_a_version_that_is_replaced_meanwhile_is_written_to_its_end(
    engine: LocalEngine, out: Path, gate: Gate, adapters: dict[str, Path]
) -> None:
    op = begin(engine)
    come_to(engine, gate, 3)
    load = engine.begin_op()
    engine.core.handle(ME, LoadAdapter(load, "all", str(adapters["one"]), on_conflict=OnConflict.REPLACE))
    gate.let(1)
    ended(engine, load)
    late = begin(engine, destination="late")
    gate.let(1000)
    for each in (op, late):
        ended(engine, each)
    for name, path in adapters.items():
        engine.load_adapter(f"plain-{name}", str(path))
        engine.export_adapter(f"plain-{name}", f"plain-{name}", ExportFormat.MERGED)
    assert files(out / "model") == files(out / "plain-all")
    assert files(out / "late") == files(out / "plain-one")
    assert [each.in_flight for each in engine.list_adapters()] == [0] * 4


def test_aliases_pinned_and_merged_ones_are_written_as_any_other(
    engine: LocalEngine, out: Path, adapters: dict[str, Path]
) -> None:
    engine.load_adapter("twin", str(adapters["all"]))
    engine.pin_adapter("twin", True)
    engine.set_resident_mode("twin", ResidentMode.MERGED)
    for name in ("all", "twin"):
        engine.export_adapter(name, name, ExportFormat.MERGED)
        engine.export_adapter(name, f"{name}-peft")
    assert files(out / "all") == files(out / "twin")
    assert files(out / "all-peft") == files(out / "twin-peft")
    assert engine.get_adapter("twin").merged_bytes > 0


@pytest.mark.parametrize(
    ("name", "destination", "error", "part"),
    [
        ("nope", "model", NotFound, "adapter 'nope' is not loaded"),
        ("all", "../model", NotPermitted, "outside"),
        ("all", "", InvalidRequest, "0 bytes"),
        ("all", "taken", AlreadyExists, "overwrite nothing"),
        ("all", "none/model", NotFound, "is no directory"),
    ],
)
def test_what_is_refused_writes_nothing(
    engine: LocalEngine, out: Path, name: str, destination: str, error: type[LoraplexError], part: str
) -> None:
    (out / "taken").mkdir()
    for format in ExportFormat:
        with pytest.raises(error, match=part):
            engine.export_adapter(name, destination, format)
    assert [path.name for path in out.iterdir()] == ["taken"]
    assert engine.get_adapter("all").in_flight == 0


@pytest.mark.parametrize("format", list(ExportFormat))
def test_no_room_is_refused_before_anything_is_written(
    engine: LocalEngine, out: Path, format: ExportFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type("Full", (), {"f_bavail": 10, "f_frsize": 512})
    monkeypatch.setattr("os.fstatvfs", lambda fd: full)
    monkeypatch.setattr("os.mkdir", lambda *args, **kwargs: pytest.fail("made a directory"))
    with pytest.raises(OverCapacity, match="5120 are free there"):
        engine.export_adapter("all", "model", format)
    assert not list(out.iterdir())


def test_without_export_dir_nothing_is_exported(base: Path, adapters: dict[str, Path]) -> None:
    engine = local_engine(base, adapter_dirs=(adapters["one"].parent,))
    engine.load_adapter("one", str(adapters["one"]))
    with pytest.raises(NotPermitted, match="started without --export-dir"):
        engine.export_adapter("one", "model")


@pytest.mark.parametrize("format", list(ExportFormat))
def test_a_source_that_changed_is_refused(
    engine: LocalEngine, out: Path, adapters: dict[str, Path], tmp_path: Path, format: ExportFormat
) -> None:
    shutil.copytree(adapters["all"], tmp_path / "mine")
    engine.load_adapter("mine", str(tmp_path / "mine"))
    weights = tmp_path / "mine" / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-2] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(Mismatch, match=r"adapter 'mine': its source .* is no longer what was loaded: it has uid"):
        engine.export_adapter("mine", "model", format)
    weights.unlink()
    with pytest.raises(InvalidAdapter, match=rf"{tmp_path}/mine/adapter_model\.safetensors is missing"):
        engine.export_adapter("mine", "model", format)
    shutil.rmtree(tmp_path / "mine")
    with pytest.raises(NotFound, match=rf"{tmp_path}/mine"):
        engine.export_adapter("mine", "model", format)
    assert not list(out.iterdir())
    assert engine.get_adapter("mine").in_flight == 0


def test_text_that_changes_while_the_adapter_is_read_is_refused(
    engine: LocalEngine, out: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is as it was again when the adapter is read: its uid alone would not tell."""
    template = shutil.copytree(adapters["one"], tmp_path / "mine") / "chat_template.jinja"
    engine.load_adapter("mine", str(tmp_path / "mine"))
    read, versions = exporting.text_of, iter(("other", ""))

    def changing(directory: AdapterDir) -> dict[str, bytes]:
        template.write_text(next(versions))
        try:
            return read(directory)
        finally:
            template.unlink()

    monkeypatch.setattr(exporting, "text_of", changing)
    with pytest.raises(Mismatch, match=r"adapter 'mine'.*: its text files changed while they were read"):
        engine.export_adapter("mine", "model", ExportFormat.MERGED)
    assert not list(out.iterdir())


def test_what_goes_wrong_in_writing_is_answered_and_leaves_nothing(
    engine: LocalEngine, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("no memory for this test")

    monkeypatch.setattr(exporting, "write_tensor", fail)
    with pytest.raises(LoraplexError, match="no memory for this test"):
        engine.export_adapter("all", "model", ExportFormat.MERGED)
    assert not list(out.iterdir())
    monkeypatch.undo()
    engine.export_adapter("all", "model", ExportFormat.MERGED)


def test_unknown_commands_are_no_harm(engine: LocalEngine) -> None:
    message: ToEngine = CancelExport(12345)
    engine.core.handle(ME, message)
    engine.turn()
    assert engine.get_adapter("all").state is AdapterState.READY
