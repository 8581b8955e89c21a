"""Every adapter kind over several ranks, all of them in one batch: each sequence's greedy tokens are those that PEFT +
transformers give it alone (float32), and nothing that can be cut is whole on any rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kind_matrix import BASES, KindMatrix
from tests.kind_runs import serve_all
from tests.ranks import ranked_engine

MODELS = tuple((arch, tied) for arch in BASES for tied in (False, True))
#: of 4 tokens: far too few for all sequences, so that some are preempted
FEW_PAGES = 40
#: every model twice, every way at two models or more; on four ranks two each have the same key/value head
RUNS = (
    ("llama", False, 2, "none", FEW_PAGES),
    ("llama", False, 4, "none", 0),
    ("llama", True, 2, "eager", 0),
    ("llama", True, 4, "none", 0),
    ("qwen3", False, 2, "none", FEW_PAGES),
    ("qwen3", False, 2, "eager", 0),
    ("qwen3", True, 2, "none", FEW_PAGES),
    ("qwen3", True, 4, "none", 0),
)
#: of one rank
_PAGE_BYTES = 4 * 2 * 2 * 8 * 4


@pytest.fixture(scope="module")
def matrices(kinds_root: Path) -> dict[tuple[str, bool], KindMatrix]:
    return {(arch, tied): KindMatrix(kinds_root, arch, tied=tied) for arch, tied in MODELS}


@pytest.mark.parametrize(("arch", "tied", "size", "mode", "pages"), RUNS)
def test_all_kinds_in_one_batch(
    matrices: dict[tuple[str, bool], KindMatrix], arch: str, tied: bool, size: int, mode: str, pages: int
) -> None:
    matrix = matrices[arch, tied]
    options: dict[str, object] = {"max_num_batched_tokens": 32, "max_num_seqs": 24, "kv_page_size": 4}
    if pages:
        options["kv_cache_memory"] = pages * _PAGE_BYTES
    with ranked_engine(matrix.base_dir, size, mode=mode, adapter_dirs=(matrix.root,), **options) as ranked:
        for name in matrix.names:
            ranked.engine.load_adapter(name, str(matrix.adapter(name)))
        serve_all(ranked.engine, matrix, preempted=bool(pages))
        for name in matrix.names:
            ranked.engine.unload_adapter(name)
        [base] = ranked.engine.generate([matrix.cases("")[0].request])
        assert tuple(base.token_ids) == matrix.cases("")[0].expected
        for runner in ranked.runners:
            assert not any(ref.rows.held for ref in runner.model.tables().values())
            assert not runner.ops.lora.slots
