"""Decode speed of one adapter that is served merged, beside that of the base and of the adapter itself.

One engine has all three: the adapter is loaded under two names, of which one is served merged. All answer the same
prompts, which lie in the prefix cache but for their last token, so that a turn is one step with that token and then
nothing but decode steps, which are timed. Turns are a few steps long, and each repeat goes there and back (base,
adapter, merged, merged, adapter, base): what the machine's speed drifts meanwhile falls on all three alike. Of a
repeat's steps the median counts, so that one which another process held up does not.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.engine.in_process import EngineSide
from bench.engine.record import BASE, Case, Goal, Sample
from bench.engine.workload import Job, Row

ENGINE: Final = "engine"
ITSELF, MERGED = "one adapter", "one adapter, merged"
#: tokens/s of the merged adapter are to be at least this share of the base's
LEAST: Final = 0.97
_MIXES: Final = {BASE: "", ITSELF: "itself", MERGED: "merged"}
#: whole pages of the prefix cache, and the token that each turn begins with
_PROMPT_TOKENS: Final = 64 + 1


@dataclass(frozen=True, slots=True)
class MergedPlan:
    """What is decoded: two turns of ``num_steps`` steps in each of ``repeats``, at each of ``batches``."""

    model_dir: Path
    dtype: str
    adapter: Path
    batches: tuple[int, ...]
    num_steps: int
    repeats: int
    threads: int

    @property
    def num_turns(self) -> int:
        return (self.repeats + 1) * len(self.batches)

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
    """Every case in every repeat. ``on_turn`` is told of each repeat before it begins; the first is a warm-up."""
    engine = EngineSide(plan.model_dir, {"itself": plan.adapter, "merged": plan.adapter}, plan.dtype, plan.threads)
    engine.serve_merged("merged")
    jobs = {case: _job(case, plan.num_steps, vocab_size) for case in plan.cases}
    for repeat in range(plan.repeats + 1):
        for batch in plan.batches:
            there = [case for case in plan.cases if case.batch == batch]
            on_turn(f"decode, batch {batch}")
            seconds: dict[Case, list[float]] = {case: [] for case in there}
            for case in there + there[::-1]:
                seconds[case] += engine.decode(jobs[case])
            if repeat:
                yield from (Sample(case, repeat, batch, statistics.median(steps)) for case, steps in seconds.items())


def _job(case: Case, num_steps: int, vocab_size: int) -> Job:
    """The same prompts for all cases of a batch. A row's first token is not one of a decode step."""
    source = random.Random(case.batch)
    prompts = [tuple(source.randrange(vocab_size // 2) for _ in range(_PROMPT_TOKENS)) for _ in range(case.batch)]
    return Job(tuple(Row(prompt, _MIXES[case.mix]) for prompt in prompts), num_steps + 1)
