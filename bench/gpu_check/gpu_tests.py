"""The GPU-marked tests, in a process of their own: a kernel that faults takes its process with it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from bench.gpu_check.section import Row, Section, Setting

ROOT = Path(__file__).parents[2]
LIMIT_S = 240.0
#: most of a run is compiling kernels for its many shapes, each on one core
PROCESSES = 8
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
    elif find_spec("xdist") is not None:
        command += ["-n", str(PROCESSES), "--dist", "load"]
    done = _run(command, LIMIT_S if setting.dry else max(1.0, min(LIMIT_S, setting.left_s())))
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


def _run(command: list[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    """What it printed, also when it had to be stopped: then all its processes are, and the exit status says so."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, stdout=pipe, stderr=pipe) as process:
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            err += f"\nstopped after {limit_s:.0f} s"
        return subprocess.CompletedProcess(command, process.returncode, out, err)


def _files() -> list[str]:
    """Those that have GPU-marked tests: others may import packages that a bare GPU machine lacks.

    Tests of the ops take their marks from the backends they run over.
    """
    tests = ROOT / "tests"
    marked = {path for path in tests.glob("**/test_*.py") if _MARK in path.read_text()}
    return sorted(str(path.relative_to(ROOT)) for path in marked.union(tests.glob("ops/test_*.py")))


def _first_failure(output: str) -> str:
    """From the first failure's heading to its error lines."""
    at = re.search(r"^_{3,} .* _{3,}$", output, re.MULTILINE)
    return output[at.start() : at.start() + 3000] if at else ""


SECTION = Section("tests", run, 30.0)
