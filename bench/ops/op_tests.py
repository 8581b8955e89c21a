"""An op's tests, run before its benchmark: the time of a kernel that is wrong says nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_S = 600


class RedTests(Exception):
    """The op's tests failed or could not be run; the message says which."""


def check_tests(op: str, root: Path = ROOT) -> int:
    """Run ``tests/ops/test_<op>_op.py`` on whatever device is here. Returns how many passed; raises RedTests."""
    if find_spec("pytest") is None:
        raise RedTests("pytest is not installed, so the op's tests cannot be run")
    path = f"tests/ops/test_{op}_op.py"
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-x", "-p", "no:cacheprovider", path]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-300:]]
    if done.returncode:
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise RedTests(f"{path}: {'; '.join(failed) or last[0]}")
    passed = re.search(r"(\d+) passed", last[0])
    if passed is None:
        raise RedTests(f"{path}: nothing was tested: {last[0]}")
    return int(passed[1])
