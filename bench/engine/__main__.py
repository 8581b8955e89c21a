"""``python -m bench.engine``: the speed table of the README."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from bench.engine.agreement import SidesDisagree, check_agreement, check_kinds
from bench.engine.dtype import add_dtype, served_dtype
from bench.engine.in_process import EngineSide
from bench.engine.kinds import make_kinds
from bench.engine.peers import PeftSide, TransformersSide
from bench.engine.record import BASE, KINDS, LORA, Case, Goal, Record, Sample
from bench.engine.serving import load_under_traffic, memory, warm_start
from bench.engine.table import show
from bench.engine.through_grpc import GrpcSide, bench_server
from bench.engine.workload import Side, make_adapters, make_job
from loraplex.config import default_cache_dir
from loraplex.demo.base import demo_gguf, ensure_demo_base
from loraplex.models.placement import DTYPES

TRANSFORMERS, PEFT, ENGINE, GRPC = "transformers", "PEFT", "engine", "gRPC"
NF4, INT8, GGUF = "engine nf4", "engine int8", "engine GGUF"
#: side -> what its base is quantized to at load; "": its file is
QUANTIZED = {NF4: "nf4", INT8: "int8", GGUF: ""}
#: and how much faster it is to be than the dense base for one sequence
FASTER = {NF4: 1.3, INT8: 1.1, GGUF: 1.3}
CASES = (
    Case(TRANSFORMERS, 1),
    Case(TRANSFORMERS, 32),
    Case(PEFT, 32, LORA),
    Case(ENGINE, 1),
    Case(ENGINE, 16),
    Case(ENGINE, 32),
    Case(ENGINE, 1, LORA),
    Case(ENGINE, 16, LORA),
    Case(ENGINE, 32, LORA),
    Case(ENGINE, 16, KINDS),
    *(Case(side, batch) for side in QUANTIZED for batch in (1, 16, 32)),
    *(Case(side, 32, LORA) for side in QUANTIZED),
    Case(GRPC, 32),
    Case(GRPC, 32, LORA),
)
GOALS = (
    Goal("base, batch 1: engine / transformers", Case(ENGINE, 1), Case(TRANSFORMERS, 1), 1.2),
    Goal("base, batch 32: engine / transformers", Case(ENGINE, 32), Case(TRANSFORMERS, 32), 1.2),
    Goal("four adapters, batch 32: engine / PEFT", Case(ENGINE, 32, LORA), Case(PEFT, 32, LORA), 3.0),
    Goal("retention: four adapters / base, batch 32", Case(ENGINE, 32, LORA), Case(ENGINE, 32), 0.8),
    Goal("retention: eight kinds / base, batch 16", Case(ENGINE, 16, KINDS), Case(ENGINE, 16), 0.7),
    *(Goal(f"base, batch 1: {side} / engine", Case(side, 1), Case(ENGINE, 1), least) for side, least in FASTER.items()),
    *(Goal(f"retention on {side}, batch 32", Case(side, 32, LORA), Case(side, 32), 0.75) for side in QUANTIZED),
    Goal("base, 32 streams: gRPC / engine", Case(GRPC, 32), Case(ENGINE, 32), 0.75),
    Goal("four adapters, 32 streams: gRPC / engine", Case(GRPC, 32, LORA), Case(ENGINE, 32, LORA), 0.75),
)
WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asks for."""

    model_dir: Path
    dtype: str
    num_tokens: int
    repeats: int
    threads: int
    sides: tuple[str, ...]
    serving: bool
    out: Path | None

    @property
    def cases(self) -> tuple[Case, ...]:
        return tuple(case for case in CASES if case.side in self.sides)


def main() -> int:
    """Run the plan. 0 when done, 1 when the sides disagree, and then nothing is reported."""
    console = Console()
    _quiet_peers()
    plan = _plan(console)
    torch.set_num_threads(plan.threads)
    vocab_size = int(AutoConfig.from_pretrained(plan.model_dir).vocab_size)
    workload = {"model": plan.model_dir.name, "dtype": plan.dtype, "num_tokens": plan.num_tokens}
    workload |= {"threads": plan.threads, "repeats": plan.repeats, "ranks": [8, 16, 32, 64]}
    record = Record(command=["python", "-m", "bench.engine", *sys.argv[1:]], workload=workload)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-bench-")))
        with console.status("making four random adapters, and one of each of eight kinds"):
            adapters = make_adapters(plan.model_dir, folder)
            kinds = make_kinds(plan.model_dir, folder / "kinds") if ENGINE in plan.sides else {}
        try:
            with console.status("checking that both sides compute the same tokens in float32"):
                compared = check_agreement(plan.model_dir, adapters, plan.threads, vocab_size)
                compared += check_kinds(plan.model_dir, kinds, plan.threads, vocab_size)
        except SidesDisagree as error:
            console.print(f"[red]not reported:[/] {error}")
            return 1
        console.print(f"both sides agree on {compared} greedy tokens in float32")
        with console.status("loading every side"):
            sides = dict(_sides(plan, adapters, kinds, folder, stack))
        record.samples.extend(
            _measure(plan, sides, {BASE: (), LORA: tuple(adapters), KINDS: tuple(kinds)}, vocab_size, console)
        )
        if plan.serving:
            with console.status("loads under traffic, warm starts, memory"):
                record.measures.extend(load_under_traffic(plan.model_dir, adapters, folder, plan.dtype))
                record.measures.extend(warm_start(plan.model_dir, adapters, folder, plan.dtype))
                record.measures.extend(memory(plan.model_dir, adapters, folder, plan.dtype))
    show(record, plan.cases, GOALS, console)
    if plan.out is not None:
        record.write(plan.out, GOALS)
        console.print(f"written to {plan.out}")
    return 0


def _quiet_peers() -> None:
    """Loading bars and deprecations of the peers' own say nothing about the measurement."""
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _sides(
    plan: Plan, adapters: dict[str, Path], kinds: dict[str, Path], folder: Path, stack: ExitStack
) -> Iterator[tuple[str, Side]]:
    if TRANSFORMERS in plan.sides:
        yield TRANSFORMERS, TransformersSide(plan.model_dir, DTYPES[plan.dtype])
    if PEFT in plan.sides:
        yield PEFT, PeftSide(plan.model_dir, adapters, DTYPES[plan.dtype])
    if ENGINE in plan.sides:
        yield ENGINE, EngineSide(plan.model_dir, adapters | kinds, plan.dtype, plan.threads)
    for side, quantization in QUANTIZED.items():
        if side in plan.sides:
            base = demo_gguf() if side == GGUF else plan.model_dir
            yield side, EngineSide(base, adapters, plan.dtype, plan.threads, quantization)
    if GRPC in plan.sides:
        server = stack.enter_context(bench_server(plan.model_dir, adapters, folder / "server.log", dtype=plan.dtype))
        yield GRPC, GrpcSide(server.address)


def _measure(
    plan: Plan, sides: dict[str, Side], mixes: dict[str, tuple[str, ...]], vocab_size: int, console: Console
) -> Iterator[Sample]:
    """Every case in every repeat, so that what else the machine does falls on all sides alike."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(plan.cases) * (plan.repeats + 1))
        for repeat in range(plan.repeats + 1):
            for case in plan.cases:
                progress.update(bar, description=case.label)
                # The first round is the warm-up: short, and not kept.
                job = make_job(
                    case.batch,
                    mixes[case.mix],
                    plan.num_tokens if repeat else WARM_UP_TOKENS,
                    vocab_size=vocab_size,
                    seed=f"{repeat} {case.batch} {case.mix}",
                )
                start = time.perf_counter()
                outputs = sides[case.side].run(job)
                seconds = time.perf_counter() - start
                tokens = sum(len(output) for output in outputs)
                assert tokens == case.batch * job.num_tokens, f"{case.label}: {tokens} tokens"
                if repeat:
                    yield Sample(case, repeat, tokens, seconds)
                progress.advance(bar)


def _plan(console: Console) -> Plan:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a Llama-family checkpoint; the demo base by default")
    add_dtype(parser)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per sequence (default 64)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of every case (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="compute threads (default: cores)")
    parser.add_argument(
        "--sides",
        default="",
        metavar="SIDE,...",
        help=f"which sides of {', '.join(dict.fromkeys(case.side for case in CASES))} (default: all; {GGUF} with the "
        f"demo base alone)",
    )
    parser.add_argument("--no-serving", action="store_true", help="leave out load under traffic, start time and memory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write machine, versions and every sample as JSON")
    args = parser.parse_args()
    known = dict.fromkeys(case.side for case in CASES if args.model is None or case.side != GGUF)
    sides = tuple(args.sides.split(",")) if args.sides else tuple(known)
    if not set(sides) <= set(known):
        parser.error(f"--sides {args.sides}: allowed are {', '.join(known)}")
    if args.model is None:
        with console.status("the demo base"):
            args.model = ensure_demo_base(default_cache_dir())
    dtype, repeats = served_dtype(args.model, args.dtype), max(1, args.repeats)
    return Plan(args.model, dtype, args.tokens, repeats, args.threads, sides, not args.no_serving, args.out)


if __name__ == "__main__":
    sys.exit(main())
