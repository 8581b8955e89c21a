"""Every adapter kind over several ranks, all of them in one batch: each sequence's greedy tokens are those that PEFT +
transformers give it alone (float32), and nothing that can be cut is whole on any rank."""

from __future__ import annotations

import random

import pytest

from loraplex.types import FinishReason
from tests.kind_matrix import BASES, KindMatrix
from tests.ranks import RankedEngine, ranked_engine

MODELS = tuple((arch, tied) for arch in BASES for tied in (False, True))
#: of 4 tokens: far too few for all sequences, so that some are preempted
FEW_PAGES = 40
#: of one rank
_PAGE_BYTES = 4 * 2 * 2 * 8 * 4


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], KindMatrix]:
    root = tmp_path_factory.mktemp("ranked-kinds")
    return {(arch, tied): KindMatrix(root, arch, tied=tied) for arch, tied in MODELS}


@pytest.mark.parametrize(("size", "mode", "pages"), [(2, "none", FEW_PAGES), (2, "eager", 0), (4, "none", 0)])
@pytest.mark.parametrize(
    ("arch", "tied"), MODELS, ids=[f"{arch}-{'tied' if tied else 'untied'}" for arch, tied in MODELS]
)
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
        _serve(ranked, matrix, preempted=bool(pages))
        for name in matrix.names:
            ranked.engine.unload_adapter(name)
        [base] = ranked.engine.generate([matrix.cases("")[0].request])
        assert tuple(base.token_ids) == matrix.cases("")[0].expected
        for runner in ranked.runners:
            assert not any(ref.rows.held for ref in runner.model.tables().values())
            assert not runner.ops.lora.slots


def _serve(ranked: RankedEngine, matrix: KindMatrix, *, preempted: bool) -> None:
    engine = ranked.engine
    cases = [*matrix.all_cases(), *matrix.all_cases()]  # each prompt twice, for the prefix cache
    rng = random.Random(7)
    rng.shuffle(cases)
    tickets = []
    for case in cases:
        tickets.append(engine.submit(case.request))
        for _ in range(rng.randint(0, 1)):
            engine.turn()
    engine.run_until_idle()
    got = [engine.generations[ticket] for ticket in tickets]
    wrong = {
        case.request.request_id: (generation.failure, generation.token_ids, case.expected)
        for case, generation in zip(cases, got, strict=True)
        if tuple(generation.token_ids) != case.expected
    }
    assert not wrong
    assert all(g.finish is FinishReason.LENGTH and g.num_endings == 1 for g in got)
    assert (engine.reports[-1].preemptions > 0) is preempted
    assert sum(g.usage.cached_prompt_tokens for g in got) > 0
    assert max(report.adapters for report in engine.reports) >= 8
    assert engine.core.num_sequences == 0
    assert engine.reports[-1].kv_pages_used == 0
