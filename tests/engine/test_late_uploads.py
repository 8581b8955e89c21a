"""An engine whose device still copies when a write returns: nobody computes with an adapter that is not there yet."""

from __future__ import annotations

import time

import pytest

from loraplex.engine.local import Generation, LocalEngine
from loraplex.engine.messages import LoadAdapter
from loraplex.types import AdapterRef, AdapterState, FinishReason, Request, Residency, StopRule
from loraplex_kernels.lora import Fence
from loraplex_kernels.lora.reference import ReferenceLora
from tests.engines import local_engine, make_adapters
from tests.fakes_adapters import SlowFences
from tests.tiny import prompt, tiny_checkpoint

NAMES = ("all", "attention")


class LateLora(ReferenceLora):
    """The reference, with fences that pass late."""

    def __init__(self) -> None:
        super().__init__()
        self.fences = SlowFences()

    def fence(self) -> Fence:
        return self.fences()


@pytest.fixture
def lora() -> LateLora:
    return LateLora()


@pytest.fixture
def engine(tmp_path_factory: pytest.TempPathFactory, lora: LateLora, monkeypatch: pytest.MonkeyPatch) -> LocalEngine:
    """Two adapters that do not fit the device together; the second one is there."""
    monkeypatch.setattr("loraplex.engine.rank.choose_lora", lambda name, device: lora)
    root = tmp_path_factory.getbasetemp()
    base = tiny_checkpoint(root, "llama", tie_word_embeddings=False)
    adapters = make_adapters(base, root / "late-adapters", NAMES)
    lora.fences.slow = False
    large = local_engine(base, adapter_dirs=(root,), attention_backend="reference")
    sizes = [large.load_adapter(name, str(path)).bytes for name, path in adapters.items()]
    engine = local_engine(base, adapter_dirs=(root,), attention_backend="reference", adapter_memory=max(sizes))
    for name, path in adapters.items():
        engine.load_adapter(name, str(path))
    engine.submit(request("attention"))
    engine.run_until_idle()
    assert [info.residency for info in engine.list_adapters()] == [Residency.HOST, Residency.DEVICE]
    lora.fences.slow = True
    return engine


def request(*names: str) -> Request:
    """Four tokens."""
    refs = tuple(AdapterRef(name) for name in names)
    return Request(f"r-{names}", prompt(5), adapters=refs, stop=StopRule(max_tokens=4, ignore_eos=True))


def submit(engine: LocalEngine, *names: str) -> Generation:
    """Begin, and turn some times."""
    generation = engine.generations[engine.submit(request(*names))]
    for _ in range(20):
        engine.turn()
    return generation


def test_a_sequence_is_admitted_when_its_adapters_copies_have_arrived(engine: LocalEngine, lora: LateLora) -> None:
    waiting = submit(engine, "all")
    base = submit(engine)
    assert base.finish is FinishReason.LENGTH, "others are served meanwhile"
    assert lora.fences.num_pending == 1
    assert (waiting.token_ids, waiting.over) == ([], False)
    assert engine.core.has_work
    assert engine.get_adapter("all").residency is Residency.HOST
    lora.fences.pass_some(1)
    engine.run_until_idle()
    assert waiting.finish is FinishReason.LENGTH
    assert engine.get_adapter("all").residency is Residency.DEVICE
    alone = engine.generate([request("all")])[0]
    assert alone.token_ids == waiting.token_ids
    assert not engine.core.has_work


def test_what_is_unloaded_on_its_way_leaves_nothing(engine: LocalEngine, lora: LateLora) -> None:
    ticket = engine.submit(request("all"))
    for _ in range(20):
        engine.turn()
    assert lora.fences.num_pending == 1
    engine.abort(ticket)
    assert engine.unload_adapter("all").state is AdapterState.UNLOADED
    assert engine.generations[ticket].finish is FinishReason.CANCELLED
    assert not engine.core.has_work
    waiting = submit(engine, "attention")
    lora.fences.pass_some(1)  # that of the adapter which is gone
    for _ in range(20):
        engine.turn()
    assert waiting.token_ids == []
    lora.fences.pass_some(1)
    engine.run_until_idle()
    assert waiting.finish is FinishReason.LENGTH


def test_a_load_is_ready_when_its_copies_have_arrived(engine: LocalEngine, lora: LateLora) -> None:
    source = engine.get_adapter("all").source
    for name in NAMES:
        engine.unload_adapter(name)
    engine.core.handle(b"other", LoadAdapter(engine.begin_op(), "new", source))
    parked = submit(engine, "new")
    deadline = time.monotonic() + 30
    while not lora.fences.num_pending and time.monotonic() < deadline:
        engine.turn()
    for _ in range(20):
        engine.turn()
    assert engine.get_adapter("new").state is AdapterState.LOADING
    assert not parked.token_ids
    lora.fences.pass_some(1)
    engine.run_until_idle()
    assert engine.get_adapter("new").state is AdapterState.READY
    assert parked.finish is FinishReason.LENGTH
