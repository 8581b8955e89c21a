"""The client's numbers beside the server's own, from its Prometheus metrics over the same time.

Both sides count the same things: tokens that came, whatever the request ended with; latencies of every request that got
a token. Counts must be equal. The server's clock starts when a call reaches its handler and knows nothing of the way
there and back, so its latencies are a little shorter; ``TOLERANCE`` says how much shorter is no news.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from bench.serve.load import OK, Outcome
from bench.serve.measures import e2es, token_gaps, ttfts
from bench.serve.workload import BASE

TOLERANCE: Final = 0.03
ALL: Final = "all"
OTHER: Final = "other"
REQUESTS: Final = "loraplex_requests_total"
_PROMPT_TOKENS: Final = "loraplex_prompt_tokens_total"
_GENERATION_TOKENS: Final = "loraplex_generation_tokens_total"
_LATENCIES: Final = {
    "mean TTFT": "loraplex_time_to_first_token_seconds",
    "mean ITL": "loraplex_inter_token_latency_seconds",
    "mean E2E": "loraplex_e2e_latency_seconds",
}
_SCRAPE_S: Final = 10.0
_MAX_EXPOSITION_BYTES: Final = 64 << 20


class MetricsUnreadable(Exception):
    """The metrics address does not answer, or not with a Loraplex server's metrics."""


class ComparedValue(msgspec.Struct, frozen=True):
    """One number from both sides. ``difference`` is (client - server) / server; 0 when both are 0."""

    #: an adapter, "base", or "all" of them
    adapter: str
    measure: str
    unit: str
    client: float
    server: float
    difference: float
    #: the difference that is allowed; 0 for a count
    allowed: float
    ok: bool


class Comparison(msgspec.Struct, frozen=True):
    """Every number that both sides have."""

    url: str
    tolerance: float
    all_ok: bool
    values: list[ComparedValue]


@dataclass(frozen=True, slots=True)
class Scrape:
    """The samples of an exposition that have an adapter label: (name, adapter, code) -> value; code is "" mostly."""

    samples: Mapping[tuple[str, str, str], float]

    def since(self, earlier: Scrape) -> Scrape:
        """What was counted after ``earlier``. A counter that fell belongs to a server that was started anew."""
        return Scrape({key: value - earlier.samples.get(key, 0.0) for key, value in self.samples.items()})

    def label(self, adapter: str) -> str:
        """What the server files an adapter under: beyond some hundred adapters that is "other" for the rest."""
        labels = {label for _, label, _ in self.samples}
        return OTHER if adapter not in labels and OTHER in labels else adapter

    def value(self, name: str, adapter: str, code: str | None = None) -> float:
        """The sum of the samples of ``name`` with that adapter label ("all": any) and code (None: any)."""
        return sum(
            value
            for (sample, label, status), value in self.samples.items()
            if sample == name and adapter in (ALL, label) and code in (None, status)
        )

    def mean(self, histogram: str, adapter: str) -> float:
        """The mean of a histogram; 0 when nothing was observed."""
        count = self.value(f"{histogram}_count", adapter)
        return self.value(f"{histogram}_sum", adapter) / count if count else 0.0


def scrape(url: str) -> Scrape:
    """Read a server's metrics. Raises MetricsUnreadable."""
    try:
        with urllib.request.urlopen(url, timeout=_SCRAPE_S) as answer:
            text = answer.read(_MAX_EXPOSITION_BYTES).decode()
        families = list(text_string_to_metric_families(text))
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise MetricsUnreadable(f"--metrics {url}: cannot be read: {reason}") from error
    if not any(f"{family.name}_total" == REQUESTS for family in families):
        raise MetricsUnreadable(f"--metrics {url}: has no {REQUESTS}; is it a Loraplex server's metrics address?")
    return Scrape(
        {
            (sample.name, sample.labels["adapter"], sample.labels.get("code", "")): sample.value
            for family in families
            for sample in family.samples
            if "adapter" in sample.labels and not sample.name.endswith("_bucket")
        }
    )


def total(scrapes: Iterable[Scrape]) -> Scrape:
    """Several windows as one."""
    samples: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    for one in scrapes:
        for key, value in one.samples.items():
            samples[key] += value
    return Scrape(dict(samples))


def compare(url: str, window: Scrape, outcomes: Sequence[Outcome]) -> Comparison:
    """Both sides over the same requests, for each adapter and in all."""
    by_adapter: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_adapter[window.label(outcome.planned.adapter or BASE)].append(outcome)
    values = [value for name in sorted(by_adapter) for value in _values(name, window, by_adapter[name])]
    values += _values(ALL, window, outcomes)
    return Comparison(url, TOLERANCE, all(value.ok for value in values), values)


def _values(adapter: str, window: Scrape, outcomes: Sequence[Outcome]) -> list[ComparedValue]:
    done = [outcome for outcome in outcomes if outcome.code == OK]
    started = [outcome for outcome in outcomes if outcome.chunk_s]
    counts = (
        ("completed", "requests", len(done), window.value(REQUESTS, adapter, OK)),
        ("ended", "requests", len(outcomes), window.value(REQUESTS, adapter)),
        ("prompt", "tokens", sum(len(o.planned.prompt) for o in done), window.value(_PROMPT_TOKENS, adapter)),
        ("generated", "tokens", sum(o.num_tokens for o in outcomes), window.value(_GENERATION_TOKENS, adapter)),
    )
    clients: dict[str, Callable[[Iterable[Outcome]], Iterable[float]]] = {
        "mean TTFT": ttfts,
        "mean ITL": token_gaps,
        "mean E2E": e2es,
    }
    return [_value(adapter, measure, unit, (client, server), 0.0) for measure, unit, client, server in counts] + [
        _value(adapter, measure, "s", (_mean(clients[measure](started)), window.mean(histogram, adapter)), TOLERANCE)
        for measure, histogram in _LATENCIES.items()
    ]


def _value(adapter: str, measure: str, unit: str, sides: tuple[float, float], allowed: float) -> ComparedValue:
    client, server = float(sides[0]), float(sides[1])
    difference = (client - server) / server if server else float(client != server)
    return ComparedValue(adapter, measure, unit, client, server, difference, allowed, abs(difference) <= allowed)


def _mean(values: Iterable[float]) -> float:
    seconds = np.fromiter(values, dtype=np.float64)
    return float(seconds.mean()) if seconds.size else 0.0
