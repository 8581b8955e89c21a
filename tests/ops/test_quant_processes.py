"""Programs of a joined launch, and those of a split product, wait for and see each other rightly."""

from __future__ import annotations

import pytest
import torch

from tests.ops import programs_at_once
from tests.ops.programs_at_once import Mistake, judged

triton = pytest.importorskip("triton", reason="the package triton is not installed")

KERNELS = programs_at_once.KERNELS / "quant" / "triton.py"
MODULE = "tests.ops.joined_in_processes"

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled for the GPU of this machine; these tests interpret them"
)


#: what is wrong with each -> the mistake
MISTAKES = {
    "no wait for y": Mistake("(item % num_columns), row_tiles,", "(item % num_columns), 0,"),
    "the first split reads all": Mistake(
        'sem="acq_rel", scope="gpu") == SPLITS - 1', 'sem="acq_rel", scope="gpu") == 0'
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is wrong with each case."""
    made = {name: (3, one.made(KERNELS, tmp_path_factory.mktemp("kernels"))) for name, one in MISTAKES.items()}
    return judged(MODULE, {"as they are": (3, KERNELS), **made})


def test_programs_that_run_at_once_end_and_agree_with_the_formula(found: dict[str, str]) -> None:
    assert not found["as they are"]


@pytest.mark.parametrize("case", MISTAKES)
def test_a_wait_that_ends_early_is_seen(found: dict[str, str], case: str) -> None:
    assert found[case], "nothing was wrong"
