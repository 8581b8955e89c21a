"""Every adapter kind on a quantized base, all of them in one batch with the base alone: each sequence's greedy tokens
are those that PEFT gives it on transformers' own quantized model (float32); where PEFT cannot, on a dense model of the
same weights."""

from __future__ import annotations

import pytest

from tests.engines import local_engine
from tests.kind_matrix import KindMatrix
from tests.kind_runs import serve_all
from tests.oracle import Alone
from tests.peft_kinds import recipes
from tests.quant.cases import CASES
from tests.quant.kinds import NOT_ON_4_BITS, kinds_on
from tests.quant.packers import bnb

#: the next one is a name of ``CASES``
NAMES = ("nf4",)


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, KindMatrix]:
    root = tmp_path_factory.mktemp("quantized-kinds")
    return {name: kinds_on(root, name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_all_kinds_in_one_batch(matrices: dict[str, KindMatrix], name: str) -> None:
    matrix = matrices[name]
    engine = local_engine(
        matrix.base_dir,
        adapter_dirs=(matrix.root,),
        quantization=CASES[name].quantization,
        max_num_batched_tokens=32,
        max_num_seqs=24,
        kv_page_size=4,
    )
    for recipe in matrix.names:
        engine.load_adapter(recipe, str(matrix.adapter(recipe)))
    serve_all(engine, matrix, preempted=False)


def test_peft_can_be_asked_on_4_bits_for_all_others(matrices: dict[str, KindMatrix]) -> None:
    """So that what is compared with a dense model instead is no more than it has to be."""
    matrix = matrices["nf4"]
    assert set(NOT_ON_4_BITS) < set(recipes(tied=False))
    for recipe in NOT_ON_4_BITS:
        with pytest.raises((RuntimeError, KeyError), match=r"size|shape|absmax"):
            Alone.on(bnb.exact_model(matrix.base_dir), matrix.adapter(recipe)).rows((5, 6, 7), 1)
