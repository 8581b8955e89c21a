"""Copies of kernels whose programs run at once, as processes over shared memory; and such copies with one mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
KERNELS = ROOT / "kernels" / "loraplex_kernels"


def run(module: str, num_programs: int, kernels: Path) -> str | None:
    """What is wrong with a few launches of a file of kernels, as ``module`` makes them; None when nothing is."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", module, str(num_programs), str(kernels)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    return done.stderr if done.returncode else None


def mutated(kernels: Path, text: str, instead: str, folder: Path) -> Path:
    """A copy in ``folder`` with ``instead`` for ``text``."""
    source = kernels.read_text()
    assert text in source, "the mutation's text is no longer in the kernels"
    copy = folder / "triton.py"
    copy.write_text(source.replace(text, instead))
    return copy
