"""Which steps a merged form serves: those that its requests have to themselves, under graphs of their own."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
import torch

from loraplex.engine import rank as engine_rank
from loraplex.engine.graphs import DecodeGraphs
from loraplex.engine.local import LocalEngine
from loraplex.layers.rows import PackedRows
from loraplex.types import OutputOptions, Request
from tests.engines import SIX_ADAPTERS, mixed_requests
from tests.fakes_graphs import TapeAttention, TapeCapture, TapeLora
from tests.merged_forms import AUTO, MERGED, folded_layers, merged, request, serve, tokens_of


def test_a_hundred_times_on_and_off_under_traffic_changes_no_token_and_no_bit_of_the_base(
    base: Path, adapters: dict[str, Path]
) -> None:
    engine = serve(base, adapters)
    watched = request(tokens=8, output=OutputOptions(logprobs=5, prompt_logprobs=True))
    before, requests = engine.generate([watched])[0], mixed_requests(3)
    expected = tokens_of(engine.generate(requests))
    rng, names = random.Random(1), list(SIX_ADAPTERS)
    running: dict[int, list[int]] = {}
    steps: list[str] = []

    def submit(index: int) -> None:
        running[engine.submit(requests[index])] = expected[index]

    for cycle in range(100):
        name = names[cycle % len(names)]
        own = [index for index, one in enumerate(requests) if [ref.name for ref in one.adapters] == [name]]
        assert engine.set_resident_mode(name, MERGED).merged_bytes > 0
        if cycle % 3 == 0:
            engine.run_until_idle()  # it has the first steps to itself
        submit(own[0])
        for _ in range(rng.randint(1, 3)):
            engine.turn()
            steps.append(kind_of_step(engine))
        submit(rng.randrange(len(requests)))
        assert engine.set_resident_mode(name, AUTO).merged_bytes == 0
        engine.turn()
        steps.append(kind_of_step(engine))
    engine.run_until_idle()
    assert min(steps.count("merged"), steps.count("mixed")) > 50
    got = {ticket: engine.generations[ticket].token_ids for ticket in running}
    assert got == running
    after = engine.generate([watched])[0]
    assert (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)
    assert after.prompt_logprobs == before.prompt_logprobs
    assert folded_layers(engine) == 0
    assert engine.core._desk._bank.stats().host_bytes == sum(info.bytes for info in engine.list_adapters())


def kind_of_step(engine: LocalEngine) -> str:
    """What a step is like for those who run: of a merged form alone, of one beside others, or of none."""
    merged = {sequence.uses.merged for sequence in engine.core._scheduler.running}
    return "plain" if not any(merged) else "merged" if len(merged) == 1 else "mixed"


def rows_multiplied(engine: LocalEngine, requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each step's first layer: rows that are multiplied by a merged form's matrix. They all run at once."""
    seen: list[int] = []
    layer = next(r.folded for r in engine.core._steps.executor.runner.model.tables().values() if r.folded is not None)
    multiply = PackedRows.multiply

    def watched(self: PackedRows, x: torch.Tensor) -> torch.Tensor:
        if any(self is held for held in layer.held.values()):
            seen.append(len(x))
        return multiply(self, x)

    monkeypatch.setattr(PackedRows, "multiply", watched)
    tokens_of(engine.generate(requests))
    return seen


def test_it_is_multiplied_by_in_steps_of_its_own_alone(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside others its adapter is served by its factors: nobody reads the weights of two models for one step."""
    merged(engine, "all", "one")
    alone = [request("all", tokens=3, seed=seed) for seed in (1, 2)]
    assert rows_multiplied(engine, alone, monkeypatch) == [18, 2, 2]
    short = msgspec.structs.replace(request("one", tokens=2), request_id="short")
    assert rows_multiplied(engine, [request("all", tokens=4), short], monkeypatch) == [1, 1]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> TapeCapture:
    monkeypatch.setattr(engine_rank, "choose_lora", lambda name, device: TapeLora())
    monkeypatch.setattr(engine_rank, "choose_attention", lambda name, device, **_: TapeAttention())
    return TapeCapture()


def test_its_own_decode_steps_are_captured_when_they_come_and_go_with_it(
    base: Path, adapters: dict[str, Path], engine: LocalEngine, capture: TapeCapture
) -> None:
    """And those of others, or of both, are what was captured before."""
    batches = [[request("all")], [request("all"), request("all", seed=2)], [request("one")]]
    batches += [[request("all", tokens=4), request("one")]]
    expected = [tokens_of(engine.generate(batch)) for batch in batches]
    engine = serve(base, adapters, capture=capture, prefix_cache=False)
    graphs = engine.core._steps.executor.runner._graphs
    assert isinstance(graphs, DecodeGraphs)
    at_start = capture.captured
    for name in ("all", "attention", "all"):  # another one, in the same slot, has graphs of its own
        merged(engine, name)
        captured, rounds = capture.captured, 2
        for batch, tokens in list(zip(batches, expected, strict=True)) * rounds:
            before = capture.replayed
            assert tokens_of(engine.generate(batch)) == tokens
            assert capture.replayed - before == 5, "every step but the prompts'"
        assert capture.captured - captured == (2 if name == "all" else 0), "one for each batch size"
        assert len(graphs._merged) == (name == "all")
        engine.set_resident_mode(name, AUTO)
        assert not graphs._merged
    assert capture.captured == at_start + 4


def test_what_cannot_be_captured_is_launched_kernel_by_kernel(
    base: Path, adapters: dict[str, Path], engine: LocalEngine, capture: TapeCapture, caplog: pytest.LogCaptureFixture
) -> None:
    expected = tokens_of(engine.generate([request("all")]))
    engine = serve(base, adapters, capture=capture)
    merged(engine, "all")
    before, capture.refuse_at = capture.replayed, capture.captured
    assert tokens_of(engine.generate([request("all")])) == expected
    assert capture.replayed == before
    assert caplog.text.count("merged adapters run without graphs in batches of 1") == 1
