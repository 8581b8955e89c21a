"""What is asked of the server, as values that go into the report: which adapters, when, how long, how good."""

from __future__ import annotations

from typing import Literal

import msgspec

#: the side of a run: every request names an adapter of the workload, or none does
Side = Literal["base", "adapters"]
#: the name of requests without an adapter where requests are told apart by adapter; the server's metrics use it too
BASE = "base"


class Popularity(msgspec.Struct, frozen=True):
    """Which adapter a request names. The definitions are those of the kernel benchmarks.

    identical: the first, always. distinct: each in turn, so that requests in flight differ while there are adapters.
    uniform: drawn, all equally likely. skewed: drawn, the i-th with a likelihood proportional to ``i ** -alpha``.
    """

    kind: Literal["identical", "distinct", "uniform", "skewed"]
    #: skewed only
    alpha: float | None = None

    def __str__(self) -> str:
        return self.kind if self.alpha is None else f"{self.kind}:{self.alpha:g}"


class Arrival(msgspec.Struct, frozen=True):
    """When a request is sent.

    closed: ``concurrency`` requests are in flight, and the end of one sends the next. poisson and gamma: an open loop
    of ``rate`` requests a second; the gaps are gamma distributed with the coefficient of variation ``cv`` (poisson: 1).
    """

    kind: Literal["closed", "poisson", "gamma"]
    concurrency: int | None = None
    rate: float | None = None
    cv: float | None = None

    def __str__(self) -> str:
        parts = (self.concurrency, self.rate, self.cv)
        return ":".join([self.kind, *(f"{part:g}" for part in parts if part is not None)])


class Lengths(msgspec.Struct, frozen=True):
    """Numbers of tokens, drawn evenly from ``low`` to ``high``, both included."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


class Slo(msgspec.Struct, frozen=True):
    """What one request must keep, in seconds; None is no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def __str__(self) -> str:
        named = {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2e": self.e2e_s}
        return ",".join(f"{name}={limit:g}s" for name, limit in named.items() if limit is not None)


class Workload(msgspec.Struct, frozen=True):
    """All that decides what is sent and when. Equal workloads (and vocabularies) send equal requests."""

    adapters: tuple[str, ...]
    popularity: Popularity
    arrival: Arrival
    prompt_tokens: Lengths
    output_tokens: Lengths
    #: in each run
    num_requests: int
    seed: int
    #: base: the same schedule is also run without adapters, taking turns
    baseline: Literal["none", "base"]
    #: runs of each side
    repeats: int
    #: requests before the first run, not measured
    warmup: int

    @property
    def sides(self) -> tuple[Side, ...]:
        """What is run in every repeat."""
        if not self.adapters:
            return ("base",)
        return ("base", "adapters") if self.baseline == "base" else ("adapters",)
