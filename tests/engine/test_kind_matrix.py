"""Every adapter kind that PEFT writes and Loraplex serves: alone, and all of them in one batch, each sequence's greedy
tokens are those that PEFT + transformers give it alone (float32)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraplex.adapters.kinds import KINDS
from loraplex.adapters.kinds.registry import KindRegistry
from loraplex.adapters.reading.config_file import parse_config
from loraplex.engine.local import LocalEngine
from tests.engines import local_engine
from tests.kind_matrix import BASES, KindMatrix
from tests.kind_runs import serve_all
from tests.peft_kinds import INVOCATION, RECIPES, TRAINED_TOKENS, recipes
from tests.tiny import VOCAB_SIZE

#: architecture, tied head
MODELS = tuple((arch, tied) for arch in BASES for tied in (False, True))
#: two that every recipe, and every sort of base, is in; on the others all are in one batch
ALONE = (("llama", False), ("qwen3", True))
by_model = pytest.mark.parametrize(
    ("arch", "tied"), MODELS, ids=[f"{arch}-{'tied' if tied else 'untied'}" for arch, tied in MODELS]
)
#: of 4 tokens: far too few for all sequences, so that some are preempted
FEW_PAGES = 40
_PAGE_BYTES = 4 * 2 * 2 * 2 * 8 * 4


@pytest.fixture(scope="module")
def matrices(kinds_root: Path) -> dict[tuple[str, bool], KindMatrix]:
    return {(arch, tied): KindMatrix(kinds_root, arch, tied=tied) for arch, tied in MODELS}


@pytest.fixture(scope="module")
def engines() -> dict[tuple[str, bool], LocalEngine]:
    """One for each model, made when it is asked for."""
    return {}


def engine_for(matrix: KindMatrix, **engine: object) -> LocalEngine:
    """Prompts are longer than a step, and pages than some."""
    settings = {"max_num_batched_tokens": 32, "max_num_seqs": 24, "kv_page_size": 4}
    return local_engine(matrix.base_dir, adapter_dirs=(matrix.root,), **{**settings, **engine})


@pytest.mark.parametrize(
    ("arch", "tied", "name"),
    [
        pytest.param(arch, tied, name, id=f"{arch}-{'tied' if tied else 'untied'}-{name}")
        for arch, tied in ALONE
        for name in recipes(tied)
    ],
)
def test_alone(
    matrices: dict[tuple[str, bool], KindMatrix],
    engines: dict[tuple[str, bool], LocalEngine],
    arch: str,
    tied: bool,
    name: str,
) -> None:
    matrix = matrices[arch, tied]
    engine = engines.setdefault((arch, tied), engine_for(matrix))
    info = engine.load_adapter(name, str(matrix.adapter(name)))
    assert info.vocab_size == RECIPES[name].vocab_size
    for case in matrix.cases(name):
        [got] = engine.generate([case.request])
        assert (got.failure, tuple(got.token_ids)) == (None, case.expected), case.request.request_id
    engine.unload_adapter(name)
    [base] = engine.generate([matrix.cases("")[0].request])
    assert tuple(base.token_ids) == matrix.cases("")[0].expected


#: every model twice, every way at two models or more
RUNS = (
    ("llama", False, "cpu", "none", 0),
    ("llama", False, "reference", "lazy", FEW_PAGES),
    ("llama", True, "cpu", "eager", FEW_PAGES),
    ("llama", True, "reference", "lazy", FEW_PAGES),
    ("qwen3", False, "cpu", "none", 0),
    ("qwen3", False, "cpu", "eager", FEW_PAGES),
    ("qwen3", True, "cpu", "eager", FEW_PAGES),
    ("qwen3", True, "reference", "lazy", FEW_PAGES),
)


@pytest.mark.parametrize(("arch", "tied", "backend", "mode", "pages"), RUNS)
def test_all_in_one_batch(
    matrices: dict[tuple[str, bool], KindMatrix], arch: str, tied: bool, backend: str, mode: str, pages: int
) -> None:
    matrix = matrices[arch, tied]
    cache = {"kv_cache_memory": pages * _PAGE_BYTES} if pages else {}
    engine = engine_for(matrix, lora_backend=backend, attention_backend=backend, mode=mode, **cache)
    for name in matrix.names:
        engine.load_adapter(name, str(matrix.adapter(name)))
    serve_all(engine, matrix, preempted=bool(pages))


def test_every_kind_is_in_the_matrix(matrices: dict[tuple[str, bool], KindMatrix]) -> None:
    """A kind that is new, and has no recipe, would be served without ever having been held against PEFT here."""
    found = set()
    for tied in (False, True):
        for name in recipes(tied):
            file = matrices["llama", tied].adapter(name) / "adapter_config.json"
            found.add(KindRegistry().of(parse_config(file.read_bytes(), name)).name)
    assert found == {kind.name for kind in KINDS}


@by_model
def test_every_adapter_answers_differently(matrices: dict[tuple[str, bool], KindMatrix], arch: str, tied: bool) -> None:
    """Otherwise the tests above could pass by serving the base, or one adapter for another."""
    matrix = matrices[arch, tied]
    ids = (*matrix.cases("")[0].request.prompt_token_ids, *INVOCATION, *TRAINED_TOKENS)
    names = ("", *matrix.names)
    rows = torch.stack([matrix.oracle(name).rows(ids, 1)[0][:VOCAB_SIZE] for name in names])
    distances = torch.cdist(rows, rows, p=float("inf")).fill_diagonal_(float("inf"))
    assert distances.min() > 0.05
