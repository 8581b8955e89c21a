"""``python -m bench.limits``: bytes and launches of our adapter kernels and of the usual ones, and what follows.

Counts, computes and draws; measures nothing and needs no accelerator.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from bench.limits.grid import BATCHES, as_json, count, digest
from bench.limits.hardware import H200
from bench.limits.markdown import filled
from bench.limits.plots import draw
from bench.limits.shapes import LLAMA_8B, read_config
from bench.limits.table import show

JSON_NAME = "bytes-and-launches.json"


def main() -> int:
    """0 when written, 2 for a model that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench.limits", description=__doc__)
    parser.add_argument("--model", type=Path, metavar="CONFIG", help=f"a config.json (default: {LLAMA_8B.name})")
    parser.add_argument("--batch", type=int, choices=BATCHES, default=32, help="rows of the steps shown (default 32)")
    parser.add_argument("--out", type=Path, default=Path("bench/out/limits"), help="folder for what is written")
    parser.add_argument("--page", type=Path, metavar="MD", help="a page whose tables to write anew: docs/GPU.md")
    arguments = parser.parse_args()
    console = Console()
    try:
        model = LLAMA_8B if arguments.model is None else read_config(arguments.model)
    except (OSError, ValueError) as error:
        console.print(f"[red]not counted:[/] {error}")
        return 2
    grid = count(model, H200)
    show(grid, arguments.batch, console)
    document = as_json(grid)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / JSON_NAME).write_text(document)
    names = [JSON_NAME, *draw(grid, digest(document), arguments.out)]
    if arguments.page is not None:
        arguments.page.write_text(filled(arguments.page.read_text(), grid))
    console.print(f"written to {arguments.out}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
