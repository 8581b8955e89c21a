"""The fused kernel's programs wait for each other rightly, whichever of them is ahead."""

from __future__ import annotations

import pytest
import torch

from tests.ops import programs_at_once
from tests.ops.programs_at_once import Mistake, judged

triton = pytest.importorskip("triton", reason="the package triton is not installed")

KERNELS = programs_at_once.KERNELS / "lora" / "triton.py"
MODULE = "tests.ops.fused_in_processes"

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled for the GPU of this machine; these tests interpret them"
)


#: what is wrong with each -> the mistake
MISTAKES = {
    "no wait": Mistake("ready, SPLITS * ", "ready, 0 * "),
    "one split too few": Mistake("ready, SPLITS * ", "ready, (SPLITS - 1) * "),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is wrong with each case."""
    made = {name: (5, one.made(KERNELS, tmp_path_factory.mktemp("kernels"))) for name, one in MISTAKES.items()}
    return judged(MODULE, {"2 programs": (2, KERNELS), "5 programs": (5, KERNELS), **made})


@pytest.mark.parametrize("case", ["2 programs", "5 programs"])
def test_programs_that_run_at_once_end_and_agree_with_the_formula(found: dict[str, str], case: str) -> None:
    assert not found[case]


@pytest.mark.parametrize("case", MISTAKES)
def test_a_wait_that_ends_early_is_seen(found: dict[str, str], case: str) -> None:
    assert "times the tolerance" in found[case]
