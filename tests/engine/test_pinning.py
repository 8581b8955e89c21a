"""Pinning a loaded adapter: it stays on the device, and what no longer fits beside it is told so."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.engine.local import LocalEngine
from loraplex.errors import NotFound, OverCapacity
from loraplex.types import AdapterRef, Request, Residency, StopRule
from tests.engines import local_engine, make_adapters
from tests.tiny import prompt, tiny_checkpoint

NAMES = ("all", "attention")


@pytest.fixture
def engine(tmp_path: Path) -> LocalEngine:
    """Two adapters that do not fit the device together."""
    base = tiny_checkpoint(tmp_path, "llama", tie_word_embeddings=False)
    adapters = make_adapters(base, tmp_path / "adapters", NAMES)
    large = local_engine(base, adapter_dirs=(tmp_path,))
    room = max(large.load_adapter(name, str(adapters[name])).bytes for name in NAMES)
    engine = local_engine(base, adapter_dirs=(tmp_path,), adapter_memory=room)
    for name in NAMES:
        engine.load_adapter(name, str(adapters[name]))
    return engine


def use(engine: LocalEngine, name: str) -> None:
    engine.generate([Request("r", prompt(5), (AdapterRef(name),), stop=StopRule(max_tokens=2))])


def test_a_pinned_one_keeps_its_place_and_others_are_refused_until_it_is_unpinned(engine: LocalEngine) -> None:
    use(engine, "all")
    assert engine.pin_adapter("all", pinned=True).pinned
    with pytest.raises(OverCapacity, match="pinned adapters"):
        engine.pin_adapter("attention", pinned=True)
    assert not engine.get_adapter("attention").pinned
    assert engine.get_adapter("all").residency is Residency.DEVICE
    assert not engine.pin_adapter("all", pinned=False).pinned
    assert engine.pin_adapter("attention", pinned=True).pinned
    use(engine, "attention")
    assert engine.get_adapter("all").residency is Residency.HOST


def test_a_content_stays_pinned_while_one_of_its_names_is(engine: LocalEngine) -> None:
    engine.load_adapter("twin", engine.get_adapter("all").source)
    for name in ("all", "twin"):
        engine.pin_adapter(name, pinned=True)
    engine.pin_adapter("all", pinned=False)
    with pytest.raises(OverCapacity):
        engine.pin_adapter("attention", pinned=True)
    engine.pin_adapter("twin", pinned=False)
    assert engine.pin_adapter("attention", pinned=True).pinned


def test_what_is_not_loaded_cannot_be_pinned(engine: LocalEngine) -> None:
    with pytest.raises(NotFound, match="'none' is not loaded"):
        engine.pin_adapter("none", pinned=True)
