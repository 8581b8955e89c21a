"""The fused kernel's programs wait for each other rightly, whichever of them is ahead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the package triton is not installed")

ROOT = Path(__file__).parent.parent.parent


KERNELS = ROOT / "kernels" / "loraplex_kernels" / "lora" / "triton.py"


pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled for the GPU of this machine; these tests interpret them"
)


def run(num_programs: int, kernels: Path) -> str | None:
    """What is wrong with a few launches of a copy of the kernels; None when nothing is."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "tests.ops.fused_in_processes", str(num_programs), str(kernels)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    return done.stderr if done.returncode else None


@pytest.mark.parametrize("num_programs", [2, 5])
def test_programs_that_run_at_once_end_and_agree_with_the_formula(num_programs: int) -> None:
    assert run(num_programs, KERNELS) is None


@pytest.mark.parametrize(
    ("text", "instead"),
    [("ready, SPLITS * ", "ready, 0 * "), ("ready, SPLITS * ", "ready, (SPLITS - 1) * ")],
    ids=["no wait", "one split too few"],
)
def test_a_wait_that_ends_early_is_seen(text: str, instead: str, tmp_path: Path) -> None:
    source = KERNELS.read_text()
    assert text in source, "the mutation's text is no longer in the kernels"
    copy = tmp_path / "triton.py"
    copy.write_text(source.replace(text, instead))
    assert "times the tolerance" in (run(5, copy) or "")
