"""``python -m bench.serve.demo``: the two loads of docs/BENCHMARKS.md, against a demo server of its own.

Starts the demo model with its adapters on free ports, loads it as a closed and as an open loop, each from a process of
its own, and writes ``docs/serve/closed`` and ``docs/serve/open``. Takes about five minutes on two cores.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from loraplex.demo.gallery import adapter_dirs
from loraplex.demo.server_process import running_server

DOCS: Final = Path(__file__).parents[2] / "docs" / "serve"
LENGTHS: Final = ("--prompt-tokens", "64-192", "--output-tokens", "32-96")
LOADS: Final = {
    "closed": ("--arrival", "closed:16", "--num-requests", "96", "--repeats", "3", "--slo", "ttft=1,tpot=100ms"),
    "open": ("--arrival", "poisson:1.5", "--num-requests", "60", "--repeats", "2", "--slo", "ttft=500ms,tpot=60ms"),
}


def main() -> int:
    """Run both loads; 0 when both were complete."""
    adapters = adapter_dirs()
    arguments = ["--model", "demo"]
    for name, path in adapters.items():
        arguments += ["--adapter", f"{name}={path}"]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-load-")))
        server = stack.enter_context(running_server(arguments, log=folder / "server.log"))
        words = ["--server", server.address, "--metrics", server.metrics_url, "--adapters", ",".join(adapters)]
        words += ["--popularity", "skewed:1", "--baseline", "base", *LENGTHS]
        # another seed for each, so that the second finds none of its prompts cached
        for seed, (name, load) in enumerate(LOADS.items()):
            more = [*load, "--seed", str(seed), "--out", str(DOCS / name)]
            code = subprocess.run([sys.executable, "-m", "bench.serve", *words, *more], check=False).returncode
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
