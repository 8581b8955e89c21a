"""The fused kernel's programs wait for each other rightly, whichever of them is ahead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ops import programs_at_once
from tests.ops.programs_at_once import mutated, run

triton = pytest.importorskip("triton", reason="the package triton is not installed")

KERNELS = programs_at_once.KERNELS / "lora" / "triton.py"
MODULE = "tests.ops.fused_in_processes"

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled for the GPU of this machine; these tests interpret them"
)


@pytest.mark.parametrize("num_programs", [2, 5])
def test_programs_that_run_at_once_end_and_agree_with_the_formula(num_programs: int) -> None:
    assert run(MODULE, num_programs, KERNELS) is None


@pytest.mark.parametrize(
    ("text", "instead"),
    [("ready, SPLITS * ", "ready, 0 * "), ("ready, SPLITS * ", "ready, (SPLITS - 1) * ")],
    ids=["no wait", "one split too few"],
)
def test_a_wait_that_ends_early_is_seen(text: str, instead: str, tmp_path: Path) -> None:
    copy = mutated(KERNELS, text, instead, tmp_path)
    assert "times the tolerance" in (run(MODULE, 5, copy) or "")
