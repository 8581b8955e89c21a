"""Copies of kernels whose programs run at once, as processes over shared memory; and such copies with one mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.interpreter import without_idle_work

ROOT = Path(__file__).parent.parent.parent
KERNELS = ROOT / "kernels" / "loraplex_kernels"


@dataclass(frozen=True)
class Mistake:
    """``instead`` for ``text`` in a file of kernels."""

    text: str
    instead: str

    def made(self, kernels: Path, folder: Path) -> Path:
        """A copy in ``folder`` that has it."""
        source = kernels.read_text()
        assert self.text in source, "the mutation's text is no longer in the kernels"
        copy = folder / "triton.py"
        copy.write_text(source.replace(self.text, self.instead))
        return copy


class WrongLaunch(Exception):
    """A launch whose programs failed, or whose result is not the formula's."""


def judged(module: str, cases: Mapping[str, tuple[int, Path]]) -> dict[str, str]:
    """What is wrong with a few launches of each case (programs, file of kernels), as ``module`` makes them; empty:
    nothing. One process, which imports torch and Triton once and forks the programs."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"}
    asked = json.dumps({name: (count, str(kernels)) for name, (count, kernels) in cases.items()})
    command = [sys.executable, "-m", module, asked]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    assert list(found) == list(cases)
    return found


def answer(launch_a_few: Callable[[int, Path], None]) -> None:
    """The other side of ``judged``: ``launch_a_few`` raises for what is wrong."""
    warnings.simplefilter("ignore", DeprecationWarning)  # forking: nothing here has started a thread
    torch.set_num_threads(1)
    without_idle_work()
    json.dump({name: _wrong(launch_a_few, *case) for name, case in json.loads(sys.argv[1]).items()}, sys.stdout)


def _wrong(launch_a_few: Callable[[int, Path], None], num_programs: int, kernels: str) -> str:
    try:
        launch_a_few(num_programs, Path(kernels))
    except Exception:
        return traceback.format_exc()
    return ""
