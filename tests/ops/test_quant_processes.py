"""Programs of a joined launch, and those of a split product, wait for and see each other rightly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ops import programs_at_once
from tests.ops.programs_at_once import mutated, run

triton = pytest.importorskip("triton", reason="the package triton is not installed")

KERNELS = programs_at_once.KERNELS / "quant" / "triton.py"
MODULE = "tests.ops.joined_in_processes"

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled for the GPU of this machine; these tests interpret them"
)


def test_programs_that_run_at_once_end_and_agree_with_the_formula() -> None:
    assert run(MODULE, 3, KERNELS) is None


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("(item % num_columns), row_tiles,", "(item % num_columns), 0,"),
        ('sem="acq_rel", scope="gpu") == SPLITS - 1', 'sem="acq_rel", scope="gpu") == 0'),
    ],
    ids=["no wait for y", "the first split reads all"],
)
def test_a_wait_that_ends_early_is_seen(text: str, instead: str, tmp_path: Path) -> None:
    copy = mutated(KERNELS, text, instead, tmp_path)
    assert run(MODULE, 3, copy), "nothing was wrong"
