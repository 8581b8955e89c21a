"""``python -m bench.merging``: what merges, exports and merged serving cost, each figure against its goal.

Sections: merges (seconds of each merge of four LoRAs of rank 16, on an idle server), trained (of the demo's own, whose
singular values fall fast, by the methods that go through dense changes), merged (decode speed of an adapter
that is served merged over the base's, with the 95 % interval of the median), memory (what a merge, of the demo's own
too, or an export takes at its height) and latency (gaps of streams beside merges and exports). All others are random
LoRAs on all linear layers of the demo base. Measure on a machine that does nothing else; memory alone does not mind.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from bench.engine.dtype import add_dtype, served_dtype
from bench.engine.record import Goal, Measure, Record
from bench.engine.table import show
from bench.engine.workload import RANKS, make_adapters
from bench.merging.large_site import SHAPE
from bench.merging.latency import DEFAULT_WORKS, WORKS, LatencyPlan, latency
from bench.merging.memory import MemoryPlan, memory
from bench.merging.merged import MergedPlan, merged
from bench.merging.merges import MergesPlan, merges
from bench.merging.methods import EQUAL_RANKS, merges_of, through_dense
from loraplex.adapters.merging.methods import METHODS
from loraplex.config import default_cache_dir
from loraplex.demo.base import ensure_demo_base
from loraplex.demo.gallery import ADAPTERS_DIR

BATCHES: Final = (1, 16)
#: of the demo's adapters, of ranks 4 to 32
TRAINED: Final = ("pirate", "sql", "json", "emoji")


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asks for. ``model_dir``: None is the demo base."""

    model_dir: Path | None
    dtype: str
    sections: tuple[str, ...]
    methods: tuple[str, ...]
    works: tuple[str, ...]
    large_shape: tuple[int, int]
    streams: int
    stream_tokens: int
    rounds: int
    steps: int
    repeats: int
    threads: int
    out: Path | None


@dataclass(frozen=True, slots=True)
class _Bench:
    """One run: what its sections use, and where they put what they find."""

    plan: Plan
    model_dir: Path
    dtype: str
    folder: Path
    console: Console
    record: Record
    made: dict[tuple[int, ...], dict[str, Path]] = field(default_factory=dict)

    def adapters(self, ranks: tuple[int, ...]) -> dict[str, Path]:
        """Random ones of these ranks, by name; made once."""
        if ranks not in self.made:
            with self.console.status(f"making {len(ranks)} random adapters"):
                self.made[ranks] = make_adapters(self.model_dir, self.folder / "-".join(map(str, ranks)), ranks)
        return self.made[ranks]

    @property
    def trained(self) -> dict[str, Path]:
        """The demo's own, whose singular values fall fast; none on another base."""
        return {} if self.plan.model_dir else {name: ADAPTERS_DIR / name for name in TRAINED}

    def take(self, measures: Iterator[Measure]) -> None:
        """Into the record, and shown."""
        found = Record(self.record.command, self.record.workload, measures=list(measures))
        self.record.measures.extend(found.measures)
        show(found, (), (), self.console)

    @contextmanager
    def turns(self, total: int) -> Iterator[Callable[[str], None]]:
        """A bar of ``total`` turns, and what is told of each."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            bar = progress.add_task("", total=total)
            done = -1

            def on_turn(description: str) -> None:
                nonlocal done
                done += 1
                progress.update(bar, description=description, completed=done)

            yield on_turn


def _merges(bench: _Bench) -> tuple[Goal, ...]:
    plan = bench.plan
    asked = MergesPlan(bench.model_dir, bench.dtype, bench.adapters(EQUAL_RANKS), merges_of(plan.methods), plan.rounds)
    with bench.turns(asked.num_turns) as on_turn:
        bench.take(merges(asked, bench.folder, on_turn))
    return ()


def _trained(bench: _Bench) -> tuple[Goal, ...]:
    plan = bench.plan
    asked = MergesPlan(
        bench.model_dir, bench.dtype, bench.trained, through_dense(merges_of(plan.methods)), plan.rounds, of=", trained"
    )
    with bench.turns(asked.num_turns) as on_turn:
        bench.take(merges(asked, bench.folder, on_turn))
    return ()


def _merged(bench: _Bench) -> tuple[Goal, ...]:
    plan, vocab_size = bench.plan, int(AutoConfig.from_pretrained(bench.model_dir).vocab_size)
    adapter = bench.adapters(EQUAL_RANKS)["r16"]
    asked = MergedPlan(bench.model_dir, bench.dtype, adapter, BATCHES, plan.steps, plan.repeats, plan.threads)
    with bench.turns(asked.num_turns) as on_turn:
        bench.record.samples.extend(merged(asked, vocab_size, on_turn))
    show(Record([], {}, samples=bench.record.samples), asked.cases, asked.goals, bench.console)
    return asked.goals


def _memory(bench: _Bench) -> tuple[Goal, ...]:
    plan = bench.plan
    adapters, options = bench.adapters(EQUAL_RANKS), merges_of(plan.methods)
    asked = MemoryPlan(bench.model_dir, bench.dtype, adapters, bench.trained, options, plan.large_shape)
    with bench.turns(asked.num_turns) as on_turn:
        bench.take(memory(asked, bench.folder, on_turn))
    return ()


def _latency(bench: _Bench) -> tuple[Goal, ...]:
    plan = bench.plan
    adapters = bench.adapters(RANKS)
    streams = plan.streams, plan.stream_tokens
    asked = LatencyPlan(bench.model_dir, bench.dtype, adapters, plan.works, *streams, plan.rounds)
    with bench.turns(asked.num_turns) as on_turn:
        bench.take(latency(asked, bench.folder, on_turn))
    return ()


#: each shows what it measured, and names what of its samples is held to
_SECTIONS: Final = {"merges": _merges, "trained": _trained, "merged": _merged, "memory": _memory, "latency": _latency}


def main(arguments: list[str] | None = None) -> int:
    """Run the plan; 0 when done, whatever was measured."""
    given = sys.argv[1:] if arguments is None else arguments
    plan, console = _plan(given), Console()
    disable_progress_bar()
    torch.set_num_threads(plan.threads)
    model_dir = plan.model_dir or ensure_demo_base(default_cache_dir())
    dtype = served_dtype(model_dir, plan.dtype)
    workload = {"model": model_dir.name, "dtype": dtype, "threads": plan.threads, "ranks": list(RANKS)}
    workload |= {"merged_ranks": list(EQUAL_RANKS), "streams": plan.streams, "stream_tokens": plan.stream_tokens}
    record = Record(command=["python", "-m", "bench.merging", *given], workload=workload | {"steps": plan.steps})
    goals: tuple[Goal, ...] = ()
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as made:
        bench = _Bench(plan, model_dir, dtype, Path(made), console, record)
        for section in plan.sections:
            goals += _SECTIONS[section](bench)
    if plan.out is not None:
        record.write(plan.out, goals)
        console.print(f"written to {plan.out}")
    return 0


def _plan(arguments: list[str]) -> Plan:
    parser = argparse.ArgumentParser(prog="python -m bench.merging", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="a Llama-family checkpoint; the demo base by default")
    add_dtype(parser)
    add("--only", choices=_SECTIONS, help="one section alone")
    add(
        "--methods", default=",".join(METHODS), metavar="METHOD,...", help="methods of merges and memory (default: all)"
    )
    works = f"what is done beside the streams: of {', '.join(WORKS)} (default: all but merge ties_svd)"
    add("--works", default=",".join(DEFAULT_WORKS), metavar="WORK,...", help=works)
    large = f"of the large site of memory (default {SHAPE[0]}x{SHAPE[1]})"
    add("--large-site", type=_shape, default=SHAPE, metavar="OUTxIN", help=large)
    add("--streams", type=int, default=16, help="streams at once (default 16)")
    add("--stream-tokens", type=int, default=100, help="tokens of each stream, over 40 (default 100)")
    add("--rounds", type=int, default=2, help="times that each merge or work is done (default 2)")
    add("--steps", type=int, default=4, help="decode steps of a turn of the section merged (default 4)")
    add("--repeats", type=int, default=60, help="how often it goes there and back (default 60)")
    add("--threads", type=int, default=torch.get_num_threads(), help="compute threads (default: cores)")
    add("--out", type=Path, metavar="FILE", help="write machine, versions and what was measured as JSON")
    args = parser.parse_args(arguments)
    chosen = {"methods": tuple(args.methods.split(",")), "works": tuple(args.works.split(","))}
    for name, known in {"methods": tuple(METHODS), "works": WORKS}.items():
        if not set(chosen[name]) <= set(known):
            parser.error(f"--{name} {','.join(chosen[name])}: allowed are {', '.join(known)}, with commas between them")
    least = {"streams": 1, "stream_tokens": 41, "rounds": 1, "steps": 1, "repeats": 1, "threads": 1}
    for name, allowed in least.items():
        if getattr(args, name) < allowed:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {allowed} or more")
    if args.model is not None and not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: no checkpoint directory (it has no config.json)")
    if args.out is not None and args.out.is_dir():
        parser.error(f"--out {args.out}: is a directory, must be a file's name")
    if args.model is not None and args.only == "trained":
        parser.error(
            f"--only trained --model {args.model}: the demo's adapters are of the demo base, which is the default"
        )
    sections = (
        (args.only,) if args.only else tuple(name for name in _SECTIONS if args.model is None or name != "trained")
    )
    sizes = (args.streams, args.stream_tokens, args.rounds, args.steps, args.repeats, args.threads)
    return Plan(args.model, args.dtype, sections, chosen["methods"], chosen["works"], args.large_site, *sizes, args.out)


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and min(int(rows), int(columns)) >= sum(EQUAL_RANKS)):
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers, {sum(EQUAL_RANKS)} or more, as in 14336x4096")
    return int(rows), int(columns)


if __name__ == "__main__":
    sys.exit(main())
