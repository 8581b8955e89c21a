"""``python -m bench.states``: decode speed of a Mamba2 base against transformers, with adapters and without.

A run of N new tokens and one of a single one are timed, one after the other on prompts of the same lengths; the
difference is the decodes alone. The first run of every case is a warm-up and is not kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from bench.engine.in_process import EngineSide
from bench.engine.peers import TransformersSide, generate
from bench.engine.record import BASE, LORA, Case, Goal, Measure, Record, Sample
from bench.engine.table import show
from bench.engine.workload import Job, Row, Side, make_job
from bench.states.models import SHAPE, VOCAB_SIZE, make_adapters, make_base, merged
from loraplex.models.registry import read_spec

TRANSFORMERS, ENGINE = "transformers", "engine"
CASES = (
    Case(TRANSFORMERS, 1),
    Case(TRANSFORMERS, 16),
    Case(ENGINE, 1),
    Case(ENGINE, 16),
    Case(ENGINE, 1, LORA),
    Case(ENGINE, 16, LORA),
)
GOALS = (
    Goal("decode, batch 1: engine / transformers", Case(ENGINE, 1), Case(TRANSFORMERS, 1), 2.0),
    Goal("decode, batch 16: engine / transformers", Case(ENGINE, 16), Case(TRANSFORMERS, 16), 4.0),
    Goal("retention: four adapters / base, batch 16", Case(ENGINE, 16, LORA), Case(ENGINE, 16), 0.85),
)
AGREED_TOKENS = 12
LONG_PROMPT = 1024
#: the server's default on a CPU: more than 16 sequences' states
STATE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asks for."""

    num_tokens: int
    repeats: int
    threads: int
    out: Path | None


def main() -> int:
    """Run the plan. 0 when done, 1 when the sides disagree, and then nothing is reported."""
    console = Console()
    disable_progress_bar()
    set_verbosity_error()
    plan = _plan()
    torch.set_num_threads(plan.threads)
    workload = {"model": "random Mamba2, 130 M", "dtype": "bfloat16", "num_tokens": plan.num_tokens}
    workload |= {"threads": plan.threads, "repeats": plan.repeats, "shape": SHAPE}
    record = Record(command=["python", "-m", "bench.states", *sys.argv[1:]], workload=workload)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as made:
        folder = Path(made)
        with console.status("making the base and four adapters"):
            base = make_base(folder / "base")
            adapters = make_adapters(base, folder / "adapters")
        with console.status("checking that both sides compute the same tokens in float32"):
            wrong = _disagreement(base, adapters, plan.threads)
        if wrong:
            console.print(f"[red]not reported:[/] {wrong}")
            return 1
        console.print("both sides agree on their greedy tokens in float32, base and every adapter")
        sides: dict[str, Side] = {
            TRANSFORMERS: TransformersSide(base, torch.bfloat16),
            ENGINE: EngineSide(base, adapters, "bfloat16", plan.threads, kv_cache_memory=STATE_BYTES),
        }
        record.samples.extend(_measure(plan, sides, tuple(adapters), console))
        record.measures.extend(_prompts(sides))
        record.measures.append(_state_memory())
    show(record, CASES, GOALS, console)
    if plan.out is not None:
        record.write(plan.out, GOALS)
        console.print(f"written to {plan.out}")
    return 0


def _measure(plan: Plan, sides: dict[str, Side], adapters: tuple[str, ...], console: Console) -> Iterator[Sample]:
    """Every case in every repeat, so that what else the machine does falls on all sides alike."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(CASES) * (plan.repeats + 1))
        for repeat in range(plan.repeats + 1):
            for case in CASES:
                progress.update(bar, description=case.label)
                names = adapters if case.mix == LORA else ()
                seed = f"{repeat} {case.batch} {case.mix}"
                job = make_job(case.batch, names, plan.num_tokens, vocab_size=VOCAB_SIZE, seed=seed)
                # backwards, so that no prefix is known
                prompts_alone = Job(tuple(Row(row.prompt[::-1], row.adapter) for row in job.rows), 1)
                seconds = _timed(sides[case.side], job) - _timed(sides[case.side], prompts_alone)
                if repeat:
                    yield Sample(case, repeat, case.batch * (plan.num_tokens - 1), seconds)
                progress.advance(bar)


def _timed(side: Side, job: Job) -> float:
    start = time.perf_counter()
    outputs = side.run(job)
    seconds = time.perf_counter() - start
    assert all(len(output) == job.num_tokens for output in outputs), "tokens are missing"
    return seconds


def _prompts(sides: dict[str, Side], repeats: int = 3) -> Iterator[Measure]:
    """Seconds to the first token of one long prompt."""
    for name, side in sides.items():
        times = []
        for repeat in range(repeats):
            prompt = tuple((7919 * (repeat + 1) * (i + 1)) % 50000 for i in range(LONG_PROMPT))
            times.append(_timed(side, Job((Row(prompt),), 1)))
        yield Measure(
            f"prompt of {LONG_PROMPT} tokens, {name}", LONG_PROMPT / min(times), "tokens/s", detail="best of 3"
        )


def _state_memory() -> Measure:
    """What one sequence keeps, in the served dtype."""
    shape = read_spec({"architectures": ["Mamba2ForCausalLM"], **SHAPE}).state_shape()
    assert shape is not None
    return Measure("states of a sequence", shape.slot_bytes(torch.bfloat16) / 1e6, "MB")


def _disagreement(base: Path, adapters: dict[str, Path], threads: int) -> str:
    """The first row and token where the engine and transformers differ; empty when none does."""
    names = ("", *adapters)
    job = make_job(len(names), names, AGREED_TOKENS, vocab_size=VOCAB_SIZE, seed="agreement")
    ours = EngineSide(base, adapters, "float32", threads).run(job)
    for row, tokens in zip(job.rows, ours, strict=True):
        model = merged(base, adapters.get(row.adapter))
        (theirs,) = generate(model, Job((row,), AGREED_TOKENS))
        if theirs != tokens:
            at = next(i for i, pair in enumerate(zip(theirs, tokens, strict=True)) if pair[0] != pair[1])
            return f"{row.adapter or BASE}, token {at}: transformers has {theirs[at]}, ours {tokens[at]}"
    return ""


def _plan() -> Plan:
    parser = argparse.ArgumentParser(prog="python -m bench.states", description=__doc__)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per sequence, at least 2 (default 64)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of every case (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="compute threads (default: cores)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write machine, versions and every sample as JSON")
    args = parser.parse_args()
    if args.tokens < 2 or args.repeats < 1:
        parser.error(f"--tokens {args.tokens}, --repeats {args.repeats}: at least 2 and 1")
    return Plan(args.tokens, args.repeats, args.threads, args.out)


if __name__ == "__main__":
    sys.exit(main())
