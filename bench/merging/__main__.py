"""``python -m bench.merging``: what merges and exports cost running streams, and how fast a merged adapter is.

Four random LoRAs of ranks 8 to 64 on all linear layers of the demo base, bfloat16. Measure on a machine that does
nothing else.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from bench.engine.record import Goal, Record
from bench.engine.table import show
from bench.engine.workload import RANKS, make_adapters
from bench.merging.latency import DEFAULT_WORKS, WORKS, LatencyPlan, latency
from bench.merging.merged import MergedPlan, merged
from loraplex.config import default_cache_dir
from loraplex.demo.base import ensure_demo_base

LATENCY, MERGED = "latency", "merged"
SECTIONS = (LATENCY, MERGED)
BATCHES = (1, 16)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asks for. ``model_dir``: None is the demo base."""

    model_dir: Path | None
    sections: tuple[str, ...]
    works: tuple[str, ...]
    streams: int
    stream_tokens: int
    rounds: int
    tokens: int
    repeats: int
    threads: int
    out: Path | None


def main(arguments: list[str] | None = None) -> int:
    """Run the plan; 0 when done, whatever was measured."""
    given = sys.argv[1:] if arguments is None else arguments
    plan, console = _plan(given), Console()
    disable_progress_bar()
    torch.set_num_threads(plan.threads)
    model_dir = plan.model_dir or ensure_demo_base(default_cache_dir())
    workload = {"model": model_dir.name, "dtype": "bfloat16", "threads": plan.threads, "ranks": list(RANKS)}
    workload |= {"streams": plan.streams, "stream_tokens": plan.stream_tokens, "num_tokens": plan.tokens}
    record = Record(command=["python", "-m", "bench.merging", *given], workload=workload)
    goals: tuple[Goal, ...] = ()
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as made:
        folder = Path(made)
        with console.status("making four random adapters"):
            adapters = make_adapters(model_dir, folder / "adapters")
        if MERGED in plan.sections:
            vocab_size = int(AutoConfig.from_pretrained(model_dir).vocab_size)
            lone = MergedPlan(model_dir, adapters["r16"], BATCHES, plan.tokens, plan.repeats, plan.threads)
            goals = lone.goals
            with _turns(console, len(lone.cases) * (plan.repeats + 1)) as on_turn:
                record.samples.extend(merged(lone, vocab_size, on_turn))
            show(record, lone.cases, goals, console)
        if LATENCY in plan.sections:
            beside = LatencyPlan(model_dir, adapters, plan.works, plan.streams, plan.stream_tokens, plan.rounds)
            with _turns(console, (len(plan.works) + 1) * plan.rounds) as on_turn:
                record.measures.extend(latency(beside, folder, on_turn))
            show(record, (), (), console)
    if plan.out is not None:
        record.write(plan.out, goals)
        console.print(f"written to {plan.out}")
    return 0


@contextmanager
def _turns(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A bar of ``total`` turns, and what is told of each."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=total)
        done = -1

        def on_turn(description: str) -> None:
            nonlocal done
            done += 1
            progress.update(bar, description=description, completed=done)

        yield on_turn


def _plan(arguments: list[str]) -> Plan:
    parser = argparse.ArgumentParser(prog="python -m bench.merging", description=__doc__)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a Llama-family checkpoint; the demo base by default")
    parser.add_argument("--only", choices=SECTIONS, help="one section alone")
    parser.add_argument(
        "--works",
        default=",".join(DEFAULT_WORKS),
        metavar="WORK,...",
        help=f"what is done beside the streams: of {', '.join(WORKS)} (default: all but merge ties_svd)",
    )
    parser.add_argument("--streams", type=int, default=16, help="streams at once (default 16)")
    parser.add_argument("--stream-tokens", type=int, default=100, help="tokens of each stream, over 40 (default 100)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each work, and quiet ones (default 2)")
    parser.add_argument("--tokens", type=int, default=32, help="decoded tokens of a merged adapter's row (default 32)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each of its cases (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="compute threads (default: cores)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write machine, versions and what was measured as JSON"
    )
    args = parser.parse_args(arguments)
    works = tuple(args.works.split(","))
    if not set(works) <= set(WORKS):
        parser.error(f"--works {args.works}: allowed are {', '.join(WORKS)}, with commas between them")
    least = {"streams": 1, "stream_tokens": 41, "rounds": 1, "tokens": 2, "repeats": 1, "threads": 1}
    for name, allowed in least.items():
        if getattr(args, name) < allowed:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {allowed} or more")
    if args.model is not None and not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: no checkpoint directory (it has no config.json)")
    if args.out is not None and args.out.is_dir():
        parser.error(f"--out {args.out}: is a directory, must be a file's name")
    sections = (args.only,) if args.only else SECTIONS
    sizes = (args.streams, args.stream_tokens, args.rounds, args.tokens, args.repeats, args.threads)
    return Plan(args.model, sections, works, *sizes, args.out)


if __name__ == "__main__":
    sys.exit(main())
