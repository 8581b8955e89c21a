"""Decode speed of one adapter that is served merged, beside that of the base and of the adapter itself.

One engine has all three, and decodes with them in turns: the adapter is loaded under two names, of which one is served
merged. All answer the same prompts, in reversed order every other time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.engine.in_process import EngineSide
from bench.engine.record import BASE, Case, Goal, Sample
from bench.engine.workload import make_job

ENGINE: Final = "engine"
ITSELF, MERGED = "one adapter", "one adapter, merged"
#: tokens/s of the merged adapter are to be at least this share of the base's
LEAST: Final = 0.97
_MIXES: Final = {BASE: (), ITSELF: ("itself",), MERGED: ("merged",)}
_WARM_UP_TOKENS: Final = 4


@dataclass(frozen=True, slots=True)
class MergedPlan:
    """What is decoded: ``num_tokens`` a row at each of ``batches``, ``repeats`` times."""

    model_dir: Path
    adapter: Path
    batches: tuple[int, ...]
    num_tokens: int
    repeats: int
    threads: int

    @property
    def cases(self) -> tuple[Case, ...]:
        return tuple(Case(ENGINE, batch, mix) for batch in self.batches for mix in _MIXES)

    @property
    def goals(self) -> tuple[Goal, ...]:
        return tuple(
            Goal(f"decode, batch {batch}: merged / base", Case(ENGINE, batch, MERGED), Case(ENGINE, batch), LEAST)
            for batch in self.batches
        )


def merged(plan: MergedPlan, vocab_size: int, on_turn: Callable[[str], None]) -> Iterator[Sample]:
    """Every case in every repeat. ``on_turn`` is told of each before it begins; the first round is a warm-up."""
    engine = EngineSide(plan.model_dir, {"itself": plan.adapter, "merged": plan.adapter}, "bfloat16", plan.threads)
    engine.serve_merged("merged")
    for repeat in range(plan.repeats + 1):
        for batch in plan.batches:
            cases = [case for case in plan.cases if case.batch == batch]
            for case in cases if repeat % 2 else reversed(cases):
                on_turn(case.label)
                num_tokens = plan.num_tokens if repeat else _WARM_UP_TOKENS
                job = make_job(batch, _MIXES[case.mix], num_tokens, vocab_size=vocab_size, seed=f"{repeat} {batch}")
                tokens, seconds = engine.decode(job)
                if repeat:
                    yield Sample(case, repeat, tokens, seconds)
