"""Engines that serve adapters merged, and what their requests are run with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from loraplex.engine.local import Generation, LocalEngine
from loraplex.types import AdapterInfo, AdapterRef, Request, ResidentMode, StopRule
from tests.engines import local_engine
from tests.tiny import prompt

MERGED: Final = ResidentMode.MERGED
AUTO: Final = ResidentMode.AUTO


def serve(base: Path, adapters: dict[str, Path], **options: object) -> LocalEngine:
    options = {"kv_page_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32, **options}
    engine = local_engine(base, adapter_dirs=(base.parent,), **options)
    for name, path in adapters.items():
        engine.load_adapter(name, str(path))
    return engine


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


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
