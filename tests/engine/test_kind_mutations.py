"""The matrix of kinds can fail: each plausible mistake turns red exactly the adapters that it touches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.engine.kind_mutations import Report
from tests.servers import environment

ROOT = Path(__file__).parents[2]


def test_every_mistake_is_seen_where_it_is(tmp_path: Path) -> None:
    """In a process of its own, because mistakes are made by replacing functions."""
    program = [sys.executable, "-W", "ignore", "-m", "tests.engine.kind_mutations", str(tmp_path)]
    done = subprocess.run(
        program, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) > 20


def test_a_mistake_that_is_not_seen_is_told() -> None:
    lora, dora = frozenset(["lora"]), frozenset(["lora", "dora"])
    assert Report("seen", lora, lora).seen
    assert not Report("not seen everywhere", dora, lora).seen
    assert not Report("seen elsewhere", lora, dora).seen
    assert not Report("touches nothing", frozenset(), frozenset()).seen
