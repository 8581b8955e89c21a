"""``python -m bench.ops lora|attention``: microseconds of an op beside the plain ways, at SmolLM2-135M's shapes."""

from __future__ import annotations

import argparse
import sys

import torch
from rich.console import Console
from rich.table import Table

from bench.ops import attention, lora
from bench.ops.timing import WrongResult

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__)
    parser.add_argument("op", choices=("lora", "attention"))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = DTYPES[arguments.dtype]
    try:
        if arguments.op == "lora":
            lines = [((r.traffic, r.layer), r.us) for r in lora.run(arguments.backend, dtype, arguments.repeats)]
        else:
            lines = [((r.step, ""), r.us) for r in attention.run(arguments.backend, dtype, arguments.repeats)]
    except WrongResult as error:
        print(f"no report: {error}", file=sys.stderr)
        return 1
    title = f"{arguments.op}, {arguments.dtype}, {torch.get_num_threads()} threads: median us of a call"
    table = Table("step", "layer", *lines[0][1], title=title)
    for labels, us in lines:
        table.add_row(*labels, *(f"{value:.0f}" for value in us.values()))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
