"""Every adapter kind on state-space and hybrid models, all in one batch: each sequence's greedy tokens are those that
PEFT + transformers give it alone (float32)."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from loraplex.engine.pools import PoolSizes
from tests.engines import local_engine
from tests.kind_matrix import STATE_BASES, KindMatrix
from tests.kind_runs import serve_all
from tests.peft_kinds import INVOCATION, SOME_OF_ALL, TRAINED_TOKENS
from tests.tiny import VOCAB_SIZE

#: base -> whether its head is tied
TIED = {name: name in ("mamba2-1-group", "bamba", "granitemoehybrid") for name in STATE_BASES}
#: the base that every recipe is made on
WHOLE = "mamba2"
#: of 4 tokens, and slots of states: far too few for all sequences, so that some are preempted
FEW = PoolSizes(num_pages=34, num_slots=13)
MANY = PoolSizes(num_pages=400, num_slots=60)
#: every base once, every way on two or more
RUNS = (
    ("mamba2", "cpu", "none", MANY),
    ("mamba2-1-group", "reference", "lazy", FEW),
    ("mamba2-8-groups", "cpu", "eager", FEW),
    ("bamba", "reference", "lazy", FEW),
    ("falcon_h1", "cpu", "none", FEW),
    ("nemotron_h", "cpu", "eager", FEW),
    ("granitemoehybrid", "reference", "eager", MANY),
)


@pytest.fixture(scope="module")
def matrices(kinds_root: Path) -> dict[str, KindMatrix]:
    return {
        name: KindMatrix(kinds_root, name, tied=tied, among=None if name == WHOLE else SOME_OF_ALL)
        for name, tied in TIED.items()
    }


@pytest.mark.parametrize(("base", "backend", "mode", "pools"), RUNS, ids=[base for base, *_ in RUNS])
def test_all_in_one_batch(
    matrices: dict[str, KindMatrix], base: str, backend: str, mode: str, pools: PoolSizes
) -> None:
    matrix = matrices[base]
    with patch("loraplex.engine.rank.pool_sizes", lambda *_: pools):
        engine = local_engine(
            matrix.base_dir,
            adapter_dirs=(matrix.root,),
            mode=mode,
            lora_backend=backend,
            attention_backend=backend,
            conv_backend=backend,
            ssd_backend=backend,
            max_num_batched_tokens=48,
            max_num_seqs=24,
            kv_page_size=4,
        )
    for name in matrix.names:
        info = engine.load_adapter(name, str(matrix.adapter(name)))
        assert info.vocab_size == matrix.recipes[name].vocab_size
    serve_all(engine, matrix, preempted=pools is FEW, at_once=6)
    for name in matrix.names:
        engine.unload_adapter(name)
    case = matrix.cases("")[0]
    [base_alone] = engine.generate([case.request])
    assert tuple(base_alone.token_ids) == case.expected


@pytest.mark.parametrize("base", STATE_BASES)
def test_every_adapter_answers_differently(matrices: dict[str, KindMatrix], base: str) -> None:
    """Otherwise the test above could pass by serving the base, or one adapter for another."""
    matrix = matrices[base]
    ids = (*matrix.cases("")[0].request.prompt_token_ids, *INVOCATION, *TRAINED_TOKENS)
    rows = torch.stack([matrix.oracle(name).rows(ids, 1)[0][:VOCAB_SIZE] for name in ("", *matrix.names)])
    distances = torch.cdist(rows, rows, p=float("inf")).fill_diagonal_(float("inf"))
    assert distances.min() > 0.05
