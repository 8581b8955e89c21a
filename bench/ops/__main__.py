"""``python -m bench.ops OP``: microseconds of an op's backends beside plain torch, on any device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from rich.console import Console
from rich.markup import escape

from bench.ops import attention, conv, lora, ssd
from bench.ops.op_tests import RedTests, check_tests
from bench.ops.options import Options, resolve_device
from bench.ops.report import Report, write
from bench.ops.shapes import SHAPES
from bench.ops.table import show
from bench.ops.timing import WrongResult

OPS: Mapping[str, Callable[[Options], Report]] = MappingProxyType(
    {"lora": lora.run, "attention": attention.run, "conv": conv.run, "ssd": ssd.run}
)
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
)


def main() -> int:
    """0 when reported, 1 when a test is red or a way wrong (nothing is reported then), 2 for what cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__)
    parser.add_argument("op", choices=sorted(OPS))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--backend", default="auto", metavar="NAME[,NAME...]", help="columns of the table")
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="smollm2")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each way (default 15)")
    parser.add_argument("--calls", type=int, default=10, help="least calls in a turn (default 10)")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--no-tests", action="store_true", help="report without running the op's tests first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    arguments = parser.parse_args()
    if min(arguments.repeats, arguments.calls) < 1:
        parser.error(f"--repeats {arguments.repeats} --calls {arguments.calls}: both must be at least 1")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console = Console(stderr=True)
    try:
        options = Options(
            backends=tuple(arguments.backend.split(",")),
            device=resolve_device(arguments.device),
            dtype=DTYPES[arguments.dtype],
            shapes=SHAPES[arguments.shapes],
            repeats=arguments.repeats,
            calls=arguments.calls,
        )
        if arguments.no_tests:
            console.print(f"the {arguments.op} op's tests were not run")
        else:
            with console.status(f"testing {arguments.op}"):
                console.print(f"{check_tests(arguments.op)} tests of the {arguments.op} op passed")
        with console.status(f"timing {arguments.op}"):
            found = OPS[arguments.op](options)
    except (WrongResult, RedTests) as error:
        console.print(f"[red]no report:[/] {escape(str(error))}")
        return 1
    except ValueError as error:
        console.print(f"[red]cannot run:[/] {escape(str(error))}")
        return 2
    show(found, Console())
    if arguments.json is not None:
        write(found, ["python", "-m", "bench.ops", *sys.argv[1:]], arguments.json)
        console.print(f"written to {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
