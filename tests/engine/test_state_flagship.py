"""The promise on hybrids: in any mix of adapters of many kinds, sums of them and the base, of prompts and answers,
under pressure of memory, each sequence's greedy tokens are those that it has alone (float32).

Alone is PEFT + transformers; of a sum it is the base plus the change that PEFT makes when it merges each adapter alone,
and of LoRAs PEFT's ``cat``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from loraplex.engine.pools import PoolSizes
from loraplex.types import AdapterRef, FinishReason, Request, StopRule
from tests.engines import in_random_arrival, local_engine
from tests.kind_matrix import Case, KindMatrix, clear_case
from tests.oracle import Alone
from tests.sum_oracle import combined, merged_changes
from tests.tiny import VOCAB_SIZE, prompt

MAX_TOKENS = 9
ARCHS = ("falcon_h1", "nemotron_h")
#: alone, and what is summed: names and weights
ADAPTERS: tuple[Mapping[str, float], ...] = (
    {},
    {"lora": 1.0},
    {"dora": 1.0},
    {"alora": 1.0},
    {"loha": 1.0},
    {"ia3-up": 1.0},
    {"lora-bias-all": 1.0},
    {"lora-saved-mixer": 1.0},
    {"lora-saved-convolution": 1.0},
    {"trainable-tokens": 1.0},
    {"lora": 0.7, "lora-ranks": -0.4},
    {"lora": 0.3, "loha": -0.2, "dora": 1.0, "rslora": 0.5},
    {"lora-saved-convolution": 1.0, "lora-ranks": 0.3, "ia3": 0.5},
)
NAMES = sorted({name for weights in ADAPTERS for name in weights})
#: of 4 tokens: far too few for all sequences, so that some are preempted; a slot for each that runs, and few snapshots
POOLS = PoolSizes(num_pages=52, num_slots=12)


def alone(matrix: KindMatrix, weights: Mapping[str, float]) -> Alone:
    if len(weights) < 2:
        return matrix.oracle("".join(weights))
    parts = [(matrix.adapter(name), weight) for name, weight in weights.items()]
    only_loras = {"lora", "lora-ranks"}.issuperset(weights)
    return combined(matrix.base_dir, parts, "cat") if only_loras else merged_changes(matrix.base_dir, parts)


def requests(matrix: KindMatrix, index: int, *, long: bool) -> Iterator[Request]:
    """Prompts for the adapters of this index: long ones begin alike."""
    weights = ADAPTERS[index]
    name = next(iter(weights), "")
    refs = tuple(AdapterRef(one, weight) for one, weight in weights.items())
    for seed in range(index * 50, index * 50 + 50):
        token_ids = matrix.long_request(name, seed).prompt_token_ids if long else prompt(2 + seed % 13, seed=seed)
        stop = StopRule(max_tokens=MAX_TOKENS, ignore_eos=True)
        yield Request(f"{'+'.join(weights)}-{long}", token_ids, adapters=refs, stop=stop)


@cache
def cases(root: Path, arch: str) -> tuple[Case, ...]:
    matrix = KindMatrix(root, arch, tied=False)
    found = []
    for index, weights in enumerate(ADAPTERS):
        oracle = alone(matrix, weights)
        found += [clear_case(str(weights), oracle, requests(matrix, index, long=long)) for long in (True, False)]
    return tuple(found)


@pytest.mark.parametrize(
    ("arch", "backend", "mode"), [("falcon_h1", "cpu", "lazy"), ("nemotron_h", "reference", "none")]
)
def test_every_sequence_is_as_alone(kinds_root: Path, arch: str, backend: str, mode: str) -> None:
    matrix = KindMatrix(kinds_root, arch, tied=False)
    with patch("loraplex.engine.rank.pool_sizes", lambda *_: POOLS):
        engine = local_engine(
            matrix.base_dir,
            adapter_dirs=(kinds_root,),
            mode=mode,
            lora_backend=backend,
            attention_backend=backend,
            conv_backend=backend,
            ssd_backend=backend,
            max_num_batched_tokens=24,
            max_num_seqs=24,
            kv_page_size=4,
        )
    for name in NAMES:
        engine.load_adapter(name, str(matrix.adapter(name)))
    rng = random.Random(3)
    asked = [*cases(kinds_root, arch)] * 2
    rng.shuffle(asked)
    got = in_random_arrival(engine, [case.request for case in asked], rng, most=1)
    wrong = {
        case.request.request_id: (generation.failure, generation.token_ids, case.expected)
        for case, generation in zip(asked, got, strict=True)
        if tuple(generation.token_ids) != case.expected
    }
    assert not wrong
    assert all(g.finish is FinishReason.LENGTH and g.num_endings == 1 for g in got)
    # what the run was meant to exercise did happen
    reports = engine.reports
    assert reports[-1].preemptions > 0
    assert sum(g.usage.cached_prompt_tokens for g in got) > 0
    assert max(report.adapters for report in reports) >= 6
    assert any(report.prefill_tokens and report.decode_tokens for report in reports)
    assert min(report.state_slots_free for report in reports) == 0
    assert (reports[-1].kv_pages_used, reports[-1].state_slots_used) == (0, 0)


@pytest.mark.parametrize("arch", ARCHS)
def test_adapters_and_sums_answer_differently(kinds_root: Path, arch: str) -> None:
    """Otherwise the test above could pass by serving the base, or a part of a sum."""
    matrix = KindMatrix(kinds_root, arch, tied=False)
    token_ids = matrix.long_request("alora").prompt_token_ids
    rows = torch.stack([alone(matrix, weights).rows(token_ids, 1)[0][:VOCAB_SIZE] for weights in ADAPTERS])
    distances = torch.cdist(rows, rows, p=float("inf")).fill_diagonal_(float("inf"))
    assert distances.min() > 0.05
