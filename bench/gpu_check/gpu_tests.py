"""The GPU-marked tests, in a process of their own: a kernel that faults takes its process with it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.gpu_check.section import Row, Section, Setting

ROOT = Path(__file__).parents[2]
LIMIT_S = 200.0
_MARK = "pytest.mark.gpu"
#: a dry run collects the tests and runs none: they would all skip
_OPTIONS = ("-p", "no:cacheprovider", "-q", "--no-header", "-o", "filterwarnings=default", "--maxfail=5")


class RedTests(Exception):
    """Some GPU-marked test did not pass: nothing measured after it is to be believed."""


def run(setting: Setting) -> Iterator[Row]:
    """One row with the counts; raises RedTests naming the first that failed."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *_OPTIONS, *_files()]
    if setting.dry:
        command.append("--collect-only")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=min(LIMIT_S, _room(setting)))
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    selected = re.search(r"(\d+)/\d+ tests collected", done.stdout)
    yield {
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0),
        "skipped": counts.get("skipped", 0),
        "collected": int(selected[1]) if selected else None,
    }
    if done.returncode:
        raise RedTests(_first_failure(done.stdout) or done.stdout[-2000:] + done.stderr[-2000:])


def _files() -> list[str]:
    """Those that have GPU-marked tests: others may import packages that a bare GPU machine lacks."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py") if _MARK in path.read_text())


def _room(setting: Setting) -> float:
    return LIMIT_S if setting.dry else max(1.0, setting.left_s())


def _first_failure(output: str) -> str:
    """From the first failure's heading to its error lines."""
    at = re.search(r"^_{3,} .* _{3,}$", output, re.MULTILINE)
    return output[at.start() : at.start() + 3000] if at else ""


SECTION = Section("tests", run, 30.0)
