"""Ranks under captured graphs, the sums over ranks among what is captured: tokens are PEFT's (float32), and all ranks
replay the same graph in the same step, whatever each of them holds of an adapter."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.engine import rank as engine_rank
from tests.engines import in_random_arrival
from tests.fakes_graphs import TapeAttention, TapeCapture, TapeLora
from tests.kind_matrix import Case, KindMatrix
from tests.merged_forms import MERGED, request, tokens_of
from tests.oracle import make_adapter
from tests.ranks import RankedEngine, ranked_engine

#: forms that graphs serve, one whose factors may be zero on a rank among them
TABLE_KINDS = ("lora", "bdlora", "dora", "loha", "ia3", "alora")
#: forms with rows of their own: of tokens on either rank, of the whole head, and of tokens that rank 0 alone has
ROW_KINDS = ("trainable-tokens", "lora-saved-head", "lora-added-tokens")


@pytest.fixture(scope="module")
def matrix(kinds_root: Path) -> KindMatrix:
    torch.set_num_threads(1)
    return KindMatrix(kinds_root, "qwen3", tied=False)


@contextmanager
def graph_engine(
    matrix: KindMatrix, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, mode: str
) -> Iterator[tuple[RankedEngine, list[TapeCapture]]]:
    monkeypatch.setattr(engine_rank, "choose_lora", lambda name, device: TapeLora())
    monkeypatch.setattr(engine_rank, "choose_attention", lambda name, device, **_: TapeAttention())
    captures = [TapeCapture() for _ in range(2)]
    options: dict[str, object] = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "kv_page_size": 4}
    with ranked_engine(
        matrix.base_dir, 2, mode=mode, captures=captures, adapter_dirs=(matrix.root,), **options
    ) as ranked:
        for name in names:
            ranked.engine.load_adapter(name, str(matrix.adapter(name)))
        yield ranked, captures


def check(ranked: RankedEngine, cases: list[Case]) -> None:
    """In random order and arrival."""
    rng = random.Random(3)
    rng.shuffle(cases)
    got = in_random_arrival(ranked.engine, [case.request for case in cases], rng, most=1)
    wanted = {case.request.request_id: case.expected for case in cases}
    found = {case.request.request_id: (g.failure, tuple(g.token_ids)) for case, g in zip(cases, got, strict=True)}
    assert found == {request_id: (None, tokens) for request_id, tokens in wanted.items()}


@pytest.mark.parametrize("mode", ["none", "eager"])
def test_sums_over_ranks_are_part_of_the_graphs(matrix: KindMatrix, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with graph_engine(matrix, TABLE_KINDS, monkeypatch, mode) as (ranked, captures):
        check(ranked, [case for name in ("", *TABLE_KINDS) for case in matrix.cases(name)])
        decodes = [r for r in ranked.engine.reports if r.decode_tokens and not r.prefill_tokens]
        assert [capture.replayed for capture in captures] == [len(decodes)] * 2
        assert len(decodes) > 3


@pytest.mark.parametrize("name", ROW_KINDS)
def test_a_step_is_a_graphs_on_all_ranks_or_on_none(
    matrix: KindMatrix, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows, padded to four in a graph: where one rank replays it and the other does not, sums do not fit."""
    with graph_engine(matrix, ("lora", name), monkeypatch, "none") as (ranked, captures):
        check(ranked, [matrix.cases(name)[0], matrix.cases("lora")[0], matrix.cases("")[0]])
        assert captures[0].replayed == captures[1].replayed


def test_a_merged_form_has_graphs_on_a_rank_that_has_nothing_of_its_adapter(
    matrix: KindMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it adds to the outputs of the second rank is zero, and is not sent there."""
    path = matrix.root / "first-half"
    make_adapter(matrix.base_dir, path, seed=1, target_modules=["q_proj"])
    factors = load_file(path / "adapter_model.safetensors")
    for key, factor in factors.items():
        if ".lora_B." in key:
            factor[len(factor) // 2 :] = 0
    save_file(factors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    with graph_engine(matrix, (), monkeypatch, "none") as (ranked, captures):
        ranked.engine.load_adapter("first-half", str(path))
        requests = [request("first-half", seed=seed) for seed in range(3)]
        expected = tokens_of(ranked.engine.generate(requests))
        assert expected != tokens_of(ranked.engine.generate([request(seed=seed) for seed in range(3)]))
        ranked.engine.set_resident_mode("first-half", MERGED)
        before = [capture.captured for capture in captures]
        assert tokens_of(ranked.engine.generate(requests)) == expected
        assert [capture.captured for capture in captures] == [count + 1 for count in before]
        assert captures[0].replayed == captures[1].replayed
