"""Every adapter kind on state-space and hybrid models over several ranks, in one batch: each sequence's greedy tokens
are those that PEFT + transformers give it alone (float32)."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from loraplex.engine.pools import PoolSizes
from tests.kind_matrix import KindMatrix
from tests.kind_runs import serve_all
from tests.peft_kinds import SOME_OF_ALL
from tests.ranks import ranked_engine

#: of 4 tokens, and slots of states: far too few for all sequences, so that some are preempted
FEW = PoolSizes(num_pages=34, num_slots=13)
MANY = PoolSizes(num_pages=400, num_slots=60)
#: one group for all ranks, two for four, as many as heads
RUNS = (
    ("mamba2-1-group", True, 4, "none", FEW),
    ("mamba2", False, 4, "eager", MANY),
    ("mamba2-8-groups", False, 2, "none", FEW),
    ("bamba", True, 2, "eager", FEW),
    ("falcon_h1", False, 4, "none", FEW),
    ("nemotron_h", False, 2, "none", FEW),
    ("granitemoehybrid", True, 2, "none", MANY),
)


@pytest.mark.parametrize(("base", "tied", "size", "mode", "pools"), RUNS, ids=[run[0] for run in RUNS])
def test_kinds_in_one_batch(kinds_root: Path, base: str, tied: bool, size: int, mode: str, pools: PoolSizes) -> None:
    matrix = KindMatrix(kinds_root, base, tied=tied, among=SOME_OF_ALL)
    options: dict[str, object] = {"max_num_batched_tokens": 48, "max_num_seqs": 24, "kv_page_size": 4}
    with (
        patch("loraplex.engine.rank.pool_sizes", lambda *_: pools),
        ranked_engine(matrix.base_dir, size, mode=mode, adapter_dirs=(matrix.root,), **options) as ranked,
    ):
        for name in matrix.names:
            ranked.engine.load_adapter(name, str(matrix.adapter(name)))
        serve_all(ranked.engine, matrix, preempted=pools is FEW, at_once=6)
        for name in matrix.names:
            ranked.engine.unload_adapter(name)
        ranked.engine.generate([matrix.cases("")[0].request])  # by then other ranks have followed, too
        for runner in ranked.runners:
            assert not any(ref.rows.held for ref in runner.model.tables().values())
            assert not runner.ops.lora.slots
