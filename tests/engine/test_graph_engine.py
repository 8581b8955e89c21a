"""A whole engine under graphs: greedy tokens are PEFT's, whatever is loaded, replaced and unloaded between replays."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from loraplex.engine import rank as engine_rank
from loraplex.engine.local import LocalEngine
from loraplex.errors import InvalidConfig
from loraplex.types import AdapterRef, OnConflict, Request, StopRule
from tests.engines import MAX_TOKENS, SIX_ADAPTERS, in_random_arrival, local_engine, make_adapters, mixed_requests
from tests.fakes_graphs import TapeAttention, TapeCapture, TapeLora
from tests.oracle import Oracle
from tests.tiny import prompt, tiny_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graph-engine")


@pytest.fixture
def tape_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_rank, "choose_lora", lambda name, device: TapeLora())
    monkeypatch.setattr(engine_rank, "choose_attention", lambda name, device, **_: TapeAttention())


def graph_engine(base: Path, root: Path, capture: TapeCapture, **engine: object) -> LocalEngine:
    settings = {"kv_page_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 24, **engine}
    return local_engine(base, adapter_dirs=(root,), capture=capture, **settings)


@pytest.mark.usefixtures("tape_backends")
@pytest.mark.parametrize("mode", ["none", "eager"])
def test_every_sequence_is_as_alone_under_graphs(root: Path, mode: str) -> None:
    base = tiny_checkpoint(root, "llama", tie_word_embeddings=False)
    adapters = make_adapters(base, root / "adapters")
    capture = TapeCapture()
    engine = graph_engine(base, root, capture, mode=mode)
    requests = mixed_requests(seed=3, count=14)
    oracle = Oracle(base, adapters)
    expected = [
        oracle.greedy(r.adapters[0].name if r.adapters else None, r.prompt_token_ids, MAX_TOKENS) for r in requests
    ]
    for name, path in adapters.items():
        engine.load_adapter(name, str(path))
    got = in_random_arrival(engine, requests, random.Random(1), most=4)
    assert [g.token_ids for g in got] == expected
    assert capture.replayed > 10
    assert engine.core.model_info.backends == {"lora": "tape", "attention": "tape", "graphs": "on"}


@pytest.mark.usefixtures("tape_backends")
@pytest.mark.parametrize("mode", ["none", "eager"])
def test_adapters_come_and_go_between_replays(root: Path, mode: str) -> None:
    """The same name, the same slot, other content: each request has the tokens of the version it began with."""
    base = tiny_checkpoint(root, "llama", tie_word_embeddings=False)
    adapters = make_adapters(base, root / "adapters")
    capture = TapeCapture()
    engine = graph_engine(base, root, capture, mode=mode, adapter_memory=1 << 20)
    oracle = Oracle(base, adapters)
    ids = prompt(7)
    rounds = []
    for turn, content in enumerate(("all", "one", "vocabulary", "all", "stabilized")):
        engine.load_adapter("changing", str(adapters[content]), OnConflict.REPLACE)
        stop = StopRule(max_tokens=4, ignore_eos=True)
        tickets = [
            engine.submit(Request(f"r{turn}-{index}", ids, adapters=refs, stop=stop))
            for index, refs in enumerate([(), (AdapterRef("changing"),)])
        ]
        for _ in range(2):  # it runs on while the next version is loaded
            engine.turn()
        rounds.append((tickets, [oracle.greedy(None, ids, 4), oracle.greedy(content, ids, 4)]))
    engine.unload_adapter("changing")
    engine.run_until_idle()
    for tickets, expected in rounds:
        assert [engine.generations[ticket].token_ids for ticket in tickets] == expected
    assert capture.replayed > 5


@pytest.mark.usefixtures("tape_backends")
def test_graphs_switched_off(root: Path) -> None:
    base = tiny_checkpoint(root, "llama", tie_word_embeddings=False)
    capture = TapeCapture()
    engine = graph_engine(base, root, capture, graphs="off")
    request = Request("r", prompt(5), stop=StopRule(max_tokens=5, ignore_eos=True))
    assert engine.generate([request])[0].token_ids == Oracle(base, {}).greedy(None, prompt(5), 5)
    assert capture.captured == capture.replayed == 0
    assert engine.core.model_info.backends["graphs"] == "off"


def test_a_cpu_has_no_graphs(root: Path) -> None:
    base = tiny_checkpoint(root, "llama", tie_word_embeddings=False)
    assert local_engine(base).core.model_info.backends["graphs"] == "off"
    with pytest.raises(InvalidConfig, match=r"graphs 'on', but the device is cpu.*allowed here are auto, off"):
        local_engine(base, graphs="on")


def test_backends_that_cannot_be_captured(root: Path) -> None:
    base = tiny_checkpoint(root, "llama", tie_word_embeddings=False)
    reference = {"lora_backend": "reference", "attention_backend": "reference"}
    engine = local_engine(base, capture=TapeCapture(), **reference)
    assert engine.core.model_info.backends["graphs"] == "off"
    with pytest.raises(InvalidConfig, match="lora backend 'reference' cannot be captured and attention backend"):
        local_engine(base, capture=TapeCapture(), graphs="on", **reference)


def test_every_adapter_of_the_mix_has_its_own_tokens(root: Path) -> None:
    """Otherwise the first test could pass by serving the base."""
    base = tiny_checkpoint(root, "llama", tie_word_embeddings=False)
    oracle = Oracle(base, make_adapters(base, root / "adapters"))
    answers = {tuple(oracle.greedy(name, prompt(12), MAX_TOKENS)) for name in [None, *SIX_ADAPTERS]}
    assert len(answers) == 1 + len(SIX_ADAPTERS)
