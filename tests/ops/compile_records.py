"""What Triton's compiler says of kernels: a module compiles them in a process of its own, without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
#: Triton's, which finds a kernel by its text, what it calls and what it is compiled for: kept between runs
CACHE = ROOT / ".pytest_cache" / "triton"


def compiled(module: str) -> list[dict[str, Any]]:
    """The records that ``module`` prints, one of each compilation."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(CACHE)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))
