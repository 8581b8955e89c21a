"""Long work of the loader's thread ends when it is to, whatever its own end brings, and takes nothing else with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loraplex.adapters.merging.team import Team
from loraplex.adapters.packed import PackedAdapter
from loraplex.engine.loader import AdapterLoader, ExportJob, ExportPiece, FoldOrder, GiveWay, LoadJob, Pieces
from loraplex.errors import RequestCancelled
from loraplex.types import Export, ExportFormat, ExportProgress
from tests.servers import until

PROGRESS = ExportProgress("weights", 1, 2)
FOLD = FoldOrder("u", 1)


def export(name: str) -> Export:
    return Export(name, "/x", "u", "/made", ExportFormat.PEFT)


@contextmanager
def loader(
    load: Callable[[LoadJob], PackedAdapter], pieces: Callable[[Export, GiveWay], Pieces]
) -> Iterator[AdapterLoader]:
    made = AdapterLoader(load, lambda: None, Team(lambda: False), pieces)
    try:
        yield made
    finally:
        made.close()


def no_load(job: LoadJob) -> PackedAdapter:
    raise ValueError(job.name)


def pieces_until(made: AdapterLoader, reached: Callable[[ExportPiece], bool]) -> ExportPiece:
    """The first of an export's pieces that is such a one."""
    found: list[ExportPiece] = []
    until(lambda: found.extend(filter(reached, made.take_pieces())) or bool(found))  # type: ignore[func-returns-value]
    return found[0]


def begun(piece: ExportPiece) -> bool:
    return piece.progress is not None


def ended(piece: ExportPiece) -> bool:
    return piece.progress is None


def test_an_export_whose_end_fails_tells_of_it_and_ends_nothing_else() -> None:
    def pieces(export: Export, give_way: GiveWay) -> Pieces:
        try:
            while True:
                time.sleep(0.01)
                yield PROGRESS
        finally:
            raise OSError("no quota")

    with loader(no_load, pieces) as made:
        made.begin(ExportJob(1, export("a")))
        pieces_until(made, begun)
        made.cancel(1)
        assert isinstance(pieces_until(made, ended).error, OSError)
        made.submit(LoadJob(2, "next", "/next"))
        until(lambda: bool(made.take_results()))


def test_an_export_that_waits_behind_a_merge_is_cancelled_at_once() -> None:
    go_on = threading.Event()

    def load(job: LoadJob) -> PackedAdapter:
        while not go_on.wait(0.01):
            job.give_way()
        raise ValueError

    def pieces(export: Export, give_way: GiveWay) -> Pieces:
        yield PROGRESS  # of one that was begun

    with loader(load, pieces) as made:
        made.submit(LoadJob(1, "merge", "/merge", FOLD))
        made.begin(ExportJob(2, export("a")))
        made.cancel(2)
        assert isinstance(pieces_until(made, ended).error, RequestCancelled)
        assert not made.take_results(), "the merge has ended"
        go_on.set()


def test_a_merge_and_an_export_are_given_up_when_the_engine_ends() -> None:
    at_it = threading.Event()
    left: list[str] = []

    def load(job: LoadJob) -> PackedAdapter:
        at_it.set()
        while True:
            time.sleep(0.01)
            job.give_way()

    def pieces(export: Export, give_way: GiveWay) -> Pieces:
        try:
            while True:
                yield PROGRESS
        finally:
            left.append(export.name)

    with loader(load, pieces) as made:
        made.begin(ExportJob(1, export("a")))
        pieces_until(made, begun)
        made.submit(LoadJob(2, "merge", "/merge", FOLD))
        assert at_it.wait(10)
    assert left == ["a"]
    assert not made._thread.is_alive()
