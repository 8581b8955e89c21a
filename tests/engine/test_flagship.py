"""The promise: in any mix of adapters, phases and memory pressure, each sequence's greedy tokens are those that PEFT +
transformers give it alone (float32)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from loraplex.types import AdapterRef, FinishReason, Request, StopRule
from tests.engines import MAX_TOKENS, SIX_ADAPTERS, in_random_arrival, local_engine, make_adapters, mixed_requests
from tests.oracle import Oracle
from tests.streams import MODES
from tests.tiny import prompt, tiny_checkpoint

ARCHS = ("llama", "qwen3")
#: family -> its checkpoint, and the six adapters by name
Models = dict[str, tuple[Path, dict[str, Path]]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flagship")


@pytest.fixture(scope="module")
def models(root: Path) -> Models:
    bases = {arch: tiny_checkpoint(root, arch, tie_word_embeddings=False) for arch in ARCHS}
    return {arch: (base, make_adapters(base, root / f"{arch}-adapters")) for arch, base in bases.items()}


@pytest.fixture(scope="module")
def expected(models: Models) -> dict[str, list[list[int]]]:
    """What PEFT answers to the mixed requests."""
    answers = {}
    for arch, (base, adapters) in models.items():
        oracle = Oracle(base, adapters)
        answers[arch] = [
            oracle.greedy(r.adapters[0].name if r.adapters else None, r.prompt_token_ids, MAX_TOKENS)
            for r in mixed_requests(seed=len(arch))
        ]
    return answers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_sequence_is_as_alone(
    root: Path, models: Models, expected: dict[str, list[list[int]]], arch: str, backend: str, mode: str
) -> None:
    base, adapters = models[arch]
    requests = mixed_requests(seed=len(arch))
    engine = local_engine(
        base,
        adapter_dirs=(root,),
        mode=mode,
        lora_backend=backend,
        attention_backend=backend,
        kv_page_size=4,
        kv_cache_memory=40 * 4 * 2 * 2 * 2 * 8 * 4,  # 40 pages: far too few for 24 sequences, so some are preempted
        max_num_batched_tokens=24,
        max_num_seqs=12,
    )
    for name, path in adapters.items():
        engine.load_adapter(name, str(path))
    got = in_random_arrival(engine, requests, random.Random(0), most=2)
    assert [g.token_ids for g in got] == expected[arch]
    assert all(g.finish is FinishReason.LENGTH and g.num_endings == 1 for g in got)
    # what the run was meant to exercise did happen
    assert engine.reports[-1].preemptions > 0
    assert sum(g.usage.cached_prompt_tokens for g in got) > 0
    assert max(report.adapters for report in engine.reports) >= 4
    assert any(report.prefill_tokens and report.decode_tokens for report in engine.reports)
    assert engine.core.num_sequences == 0
    assert engine.reports[-1].kv_pages_used == 0


def test_adapters_change_the_tokens(root: Path) -> None:
    """Otherwise the test above could pass by serving the base."""
    base = tiny_checkpoint(root, "llama", tie_word_embeddings=False)
    oracle = Oracle(base, make_adapters(base, root / "llama-adapters"))
    answers = {name: tuple(oracle.greedy(name, prompt(12), MAX_TOKENS)) for name in [None, *SIX_ADAPTERS]}
    assert len(set(answers.values())) == len(answers)


def test_a_weighted_sum_is_peft_cat(root: Path) -> None:
    base = tiny_checkpoint(root, "llama", tie_word_embeddings=False)
    adapters = make_adapters(base, root / "llama-adapters")
    parts = {"all": 0.7, "attention": -0.4, "stabilized": 1.5}
    oracle = Oracle(base, adapters)
    oracle.add_weighted("sum", parts)
    engine = local_engine(base, adapter_dirs=(root,))
    for name in parts:
        engine.load_adapter(name, str(adapters[name]))
    requests = [
        Request(
            f"r{i}",
            prompt(9 + i, seed=i),
            adapters=tuple(AdapterRef(n, w) for n, w in parts.items()) if i % 2 else (),
            stop=StopRule(max_tokens=MAX_TOKENS, ignore_eos=True),
        )
        for i in range(4)
    ]
    expected = [oracle.greedy("sum" if r.adapters else None, r.prompt_token_ids, MAX_TOKENS) for r in requests]
    assert [g.token_ids for g in engine.generate(requests)] == expected
