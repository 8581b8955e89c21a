"""The promise of ``test_flagship`` on a GPU: graphs on and off, exactly in float32, nearly in bfloat16."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
import torch

from loraplex.engine.local import Generation, LocalEngine
from loraplex.errors import InvalidConfig
from loraplex.types import AdapterRef, OnConflict, Request, StopRule
from tests.engines import MAX_TOKENS, in_random_arrival, local_engine, make_adapters, mixed_requests
from tests.oracle import Oracle
from tests.tiny import prompt, tiny_checkpoint

#: standard deviations of a row of logits that bfloat16 may be wrong by; the backends of a CPU are, by up to 0.05
BFLOAT16_SHORTFALL = 0.15


def _missing() -> str:
    if not torch.cuda.is_available():
        return "a CUDA device: torch sees none"
    return "" if importlib.util.find_spec("triton") else "triton, for backends that can be captured"


on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(bool(_missing()), reason=f"needs {_missing()}")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu-engine")


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    return tiny_checkpoint(root, "qwen3", tie_word_embeddings=False)


def serve(engine: LocalEngine, adapters: dict[str, Path], requests: list[Request]) -> list[Generation]:
    """All requests, arriving now and then."""
    for name, path in adapters.items():
        engine.load_adapter(name, str(path))
    return in_random_arrival(engine, requests, random.Random(0), most=3)


@pytest.mark.parametrize(
    ("device", "dtype", "graphs"),
    [
        *(pytest.param("cuda", d, g, marks=on_a_gpu) for d in ("float32", "bfloat16") for g in ("on", "off")),
        ("cpu", "bfloat16", "off"),  # where the measure of nearness is taken from
    ],
)
def test_every_sequence_is_as_alone(root: Path, base: Path, device: str, dtype: str, graphs: str) -> None:
    adapters = make_adapters(base, root / "adapters")
    engine = local_engine(
        base,
        adapter_dirs=(root,),
        device=device,
        dtype=dtype,
        graphs=graphs,
        max_num_seqs=12,
        max_num_batched_tokens=24,
    )
    assert engine.core.model_info.backends["graphs"] == graphs
    requests = mixed_requests(seed=5)
    got = serve(engine, adapters, requests)
    oracle = Oracle(base, adapters)
    for request, generation in zip(requests, got, strict=True):
        name = request.adapters[0].name if request.adapters else None
        ids, tokens = request.prompt_token_ids, generation.token_ids
        if dtype == "float32":
            assert tokens == oracle.greedy(name, ids, MAX_TOKENS)
        assert max(oracle.shortfalls(name, ids, tokens)) < BFLOAT16_SHORTFALL


def test_nearness_tells_adapters_apart(root: Path, base: Path) -> None:
    """Otherwise the bfloat16 test could pass with another adapter's tokens."""
    oracle = Oracle(base, make_adapters(base, root / "adapters"))
    tokens = oracle.greedy("all", prompt(9), MAX_TOKENS)
    assert max(oracle.shortfalls("all", prompt(9), tokens)) == 0
    for other in (None, "attention", "patterned"):
        assert max(oracle.shortfalls(other, prompt(9), tokens)) > 5 * BFLOAT16_SHORTFALL


@pytest.mark.gpu
@pytest.mark.skipif(bool(_missing()), reason=f"needs {_missing()}")
def test_adapters_come_and_go_between_replays(root: Path, base: Path) -> None:
    adapters = make_adapters(base, root / "adapters")
    engine = local_engine(base, adapter_dirs=(root,), device="cuda", graphs="on", adapter_memory=1 << 20)
    oracle = Oracle(base, adapters)
    stop = StopRule(max_tokens=4, ignore_eos=True)
    rounds = []
    for turn, content in enumerate(("all", "one", "vocabulary", "all", "stabilized")):
        engine.load_adapter("changing", str(adapters[content]), OnConflict.REPLACE)
        ticket = engine.submit(Request(f"r{turn}", prompt(7), adapters=(AdapterRef("changing"),), stop=stop))
        for _ in range(2):
            engine.turn()
        rounds.append((ticket, oracle.greedy(content, prompt(7), 4)))
    engine.run_until_idle()
    for ticket, expected in rounds:
        assert engine.generations[ticket].token_ids == expected


@pytest.mark.gpu
@pytest.mark.skipif(bool(_missing()), reason=f"needs {_missing()}")
def test_budgets_larger_than_the_gpu_are_refused(base: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"adapters 1,048,576 MiB.* are free on cuda:0: lower --kv-cache-memory"):
        local_engine(base, device="cuda", adapter_memory=1 << 40)
