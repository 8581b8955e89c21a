"""What is sent and when, drawn beforehand from the seed. Knows no server and no clock."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from msgspec import structs

from bench.serve.workload import Arrival, Lengths, Popularity, Workload

#: what is drawn, each from a stream of its own, so that another choice of one leaves the others as they were
_ARRIVALS, _ADAPTERS, _PROMPT_LENGTHS, _OUTPUT_LENGTHS, _PROMPTS = range(5)
#: the repeat that warm-up requests are drawn as; runs count from 1
WARM_UP: Final = 0


@dataclass(frozen=True, slots=True)
class Planned:
    """One request before it is sent."""

    index: int
    #: seconds after the start of the run; None in a closed loop, where the end of another request sends it
    due_s: float | None
    #: "" is the base model
    adapter: str
    prompt: Sequence[int]
    output_tokens: int


def make_schedule(workload: Workload, repeat: int, vocab_size: int) -> tuple[Planned, ...]:
    """The requests of one repeat, in the order they are sent. Prompts differ between repeats, so no cache has them."""

    def source(stream: int) -> np.random.Generator:
        return np.random.default_rng([workload.seed, repeat, stream])

    num = workload.num_requests
    due = arrivals(workload.arrival, num, source(_ARRIVALS))
    names = chosen(workload.popularity, workload.adapters, num, source(_ADAPTERS))
    prompt_lengths = _lengths(workload.prompt_tokens, num, source(_PROMPT_LENGTHS))
    output_lengths = _lengths(workload.output_tokens, num, source(_OUTPUT_LENGTHS))
    ids = source(_PROMPTS)
    return tuple(
        Planned(index, due[index], names[index], _prompt(prompt_lengths[index], vocab_size, ids), output_lengths[index])
        for index in range(num)
    )


def warm_up_schedule(workload: Workload, vocab_size: int) -> tuple[Planned, ...]:
    """Requests that touch the base model and every adapter in turn, of the workload's lengths, for a closed loop."""
    names = ("", *workload.adapters)
    like = make_schedule(structs.replace(workload, num_requests=max(1, workload.warmup)), WARM_UP, vocab_size)
    return tuple(
        replace(like[index], due_s=None, adapter=names[index % len(names)]) for index in range(workload.warmup)
    )


def base_only(schedule: Sequence[Planned]) -> tuple[Planned, ...]:
    """The same requests without their adapters."""
    return tuple(replace(planned, adapter="") for planned in schedule)


def arrivals(arrival: Arrival, num: int, source: np.random.Generator) -> list[float | None]:
    """Seconds after the start at which each of ``num`` requests is due, rising from 0; None each in a closed loop."""
    if arrival.rate is None:
        return [None] * num
    cv = 1.0 if arrival.cv is None else arrival.cv
    # A gamma distribution of this shape and scale has the mean 1 / rate and the coefficient of variation cv.
    gaps = source.gamma(shape=cv**-2, scale=cv**2 / arrival.rate, size=num)
    gaps[0] = 0.0
    return [float(due) for due in np.cumsum(gaps)]


def chosen(popularity: Popularity, names: Sequence[str], num: int, source: np.random.Generator) -> list[str]:
    """The adapter of each of ``num`` requests; the base model ("") when there are no names."""
    if not names:
        return [""] * num
    if popularity.kind == "identical":
        return [names[0]] * num
    if popularity.kind == "distinct":
        return [names[index % len(names)] for index in range(num)]
    weights = np.arange(1, len(names) + 1) ** -(popularity.alpha or 0.0)
    return [names[index] for index in source.choice(len(names), size=num, p=weights / weights.sum())]


def _lengths(lengths: Lengths, num: int, source: np.random.Generator) -> list[int]:
    return [int(length) for length in source.integers(lengths.low, lengths.high, size=num, endpoint=True)]


def _prompt(length: int, vocab_size: int, source: np.random.Generator) -> Sequence[int]:
    return array("I", source.integers(vocab_size, size=length, dtype=np.uint32).tobytes())
