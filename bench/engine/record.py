"""What a run leaves behind: samples, the medians of ratios against their goals, and the machine they were taken on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from bench.machine import machine, versions
from bench.result_file import write_result

SCHEMA = 2
BASE, LORA, KINDS = "base", "four adapters", "eight kinds"
PACKAGES = ("torch", "transformers", "peft", "grpcio", "msgspec", "pyzmq")


@dataclass(frozen=True, slots=True)
class Case:
    """What was run: a side, how many sequences at once, and which adapters they mixed."""

    side: str
    batch: int
    mix: str = BASE

    @property
    def label(self) -> str:
        return f"{self.side}, {self.mix}, batch {self.batch}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed run."""

    case: Case
    repeat: int
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Goal:
    """The median over the repeats of ``over``'s tokens/s divided by ``under``'s is to be at least ``least``."""

    name: str
    over: Case
    under: Case
    least: float


@dataclass(frozen=True, slots=True)
class Measure:
    """One number beside the speed table, with its limit in the same unit (None: no limit is set)."""

    name: str
    value: float
    unit: str
    most: float | None = None
    detail: str = ""


@dataclass
class Record:
    """Everything of one run. Owned by ``__main__``."""

    command: list[str]
    workload: dict[str, object]
    samples: list[Sample] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)

    def median_tokens_per_s(self, case: Case) -> float:
        return statistics.median(sample.tokens_per_s for sample in self.samples if sample.case == case)

    def ratios(self, goal: Goal) -> list[float]:
        """One ratio for each repeat that has both cases."""
        over = {sample.repeat: sample.tokens_per_s for sample in self.samples if sample.case == goal.over}
        under = {sample.repeat: sample.tokens_per_s for sample in self.samples if sample.case == goal.under}
        return [over[repeat] / under[repeat] for repeat in sorted(over.keys() & under.keys())]

    def write(self, path: Path, goals: tuple[Goal, ...]) -> None:
        """As JSON, made whole or not at all."""
        found = {
            "machine": msgspec.to_builtins(machine()),
            "versions": versions(PACKAGES),
            "workload": self.workload,
            "goals": [
                {
                    "name": goal.name,
                    "ratios": self.ratios(goal),
                    "median": statistics.median(self.ratios(goal)),
                    "interval": interval(self.ratios(goal)),
                    "least": goal.least,
                }
                for goal in goals
                if self.ratios(goal)
            ],
            "measures": [asdict(measure) for measure in self.measures],
            "samples": [asdict(sample) | {"tokens_per_s": sample.tokens_per_s} for sample in self.samples],
        }
        write_result(path, SCHEMA, self.command, found)


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Where the median of such ratios lies at 95 %, whatever their distribution: one is as often below the median as
    above it, so that how many are below is a binomial number. Of five or fewer the least and the most."""
    ordered, count = sorted(ratios), len(ratios)
    place, tail = 0, 1
    while (tail := tail + math.comb(count, place + 1)) <= 0.025 * 2**count:
        place += 1
    return ordered[place], ordered[-1 - place]
