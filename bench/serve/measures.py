"""Statistics of requests that were sent: latencies, rates, errors, goodput. Pure: outcomes in, values out.

The definitions are in ``DEFINITIONS``, which the report prints.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec
import numpy as np

from bench.serve.load import OK, UNFINISHED, Outcome
from bench.serve.workload import Slo

DEFINITIONS: Final = {
    "TTFT": "time to first token: from just before the request is sent to its first token, at the client",
    "TPOT": "time per output token: of one request, from its first to its last token, divided by its tokens less one",
    "ITL": "inter-token latency: between tokens of one request. k tokens that come together after a gap g count as k "
    "gaps of g / k; those that come with the first token as gaps of 0",
    "E2E": "end to end: from just before the request is sent to the end of its stream",
    "p50, p90, p99": "percentiles, linear between the two nearest ranks",
    "output tok/s": "output tokens of completed requests over the time from the start of the run to its last end; "
    "total tok/s adds their prompt tokens",
    "goodput": "requests that completed with all tokens asked for and within every limit of the SLO; the share is of "
    "all requests sent, failed and cut off ones too",
    "failed": "ended with a gRPC status other than OK; in no latency and no rate",
    "cut off": "still in flight when the load was stopped; in no latency and no rate",
    "retention": "output tok/s with adapters divided by output tok/s of the same requests without: one ratio for each "
    "repeat in which all requests of both sides completed, and their median",
    "send lag": "how much later than due an open loop's request was sent: the client's own fault",
}
#: the shares at which ``distribution`` gives values: 0, 0.5, ... 100 %
DISTRIBUTION_POINTS: Final = tuple(point / 2 for point in range(201))


class Latency(msgspec.Struct, frozen=True):
    """Seconds, over ``count`` values."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Goodput(msgspec.Struct, frozen=True):
    """Requests that kept the SLO."""

    good: int
    #: of the requests sent
    share: float
    requests_per_s: float


class Summary(msgspec.Struct, frozen=True):
    """A group of requests. A latency is None when no request has one."""

    sent: int
    completed: int
    failed: int
    cut_off: int
    #: gRPC status code -> failed requests
    errors: dict[str, int]
    #: completed with fewer tokens than asked for
    short: int
    #: of completed requests
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int
    #: the time that the rates are taken over
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_s: Latency | None
    tpot_s: Latency | None
    itl_s: Latency | None
    e2e_s: Latency | None
    #: what of the TTFT the server does not know of: the client's value less the server's own
    hop_s: Latency | None
    goodput: Goodput | None


def summarize(outcomes: Sequence[Outcome], duration_s: float, slo: Slo | None) -> Summary:
    """The statistics of ``outcomes``, which took ``duration_s`` (above 0) in all."""
    done = [outcome for outcome in outcomes if outcome.code == OK]
    errors = Counter(outcome.code for outcome in outcomes if outcome.code not in (OK, UNFINISHED))
    prompt_tokens = sum(len(outcome.planned.prompt) for outcome in done)
    output_tokens = sum(outcome.num_tokens for outcome in done)
    return Summary(
        sent=len(outcomes),
        completed=len(done),
        failed=errors.total(),
        cut_off=sum(outcome.code == UNFINISHED for outcome in outcomes),
        errors=dict(sorted(errors.items())),
        short=sum(_short(outcome) for outcome in done),
        prompt_tokens=prompt_tokens,
        cached_prompt_tokens=sum(outcome.cached_prompt_tokens for outcome in done),
        output_tokens=output_tokens,
        duration_s=duration_s,
        requests_per_s=len(done) / duration_s,
        output_tokens_per_s=output_tokens / duration_s,
        total_tokens_per_s=(prompt_tokens + output_tokens) / duration_s,
        ttft_s=latency(ttfts(done)),
        tpot_s=latency(tpots(done)),
        itl_s=latency(token_gaps(done)),
        e2e_s=latency(e2es(done)),
        hop_s=latency(_hops(done)),
        goodput=None if slo is None else _goodput(outcomes, duration_s, slo),
    )


def latency(values: Iterable[float]) -> Latency | None:
    """Mean, percentiles (linear between ranks) and maximum; None of no values."""
    seconds = np.fromiter(values, dtype=np.float64)
    if not seconds.size:
        return None
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, (50, 90, 99)))
    return Latency(int(seconds.size), float(seconds.mean()), p50, p90, p99, float(seconds.max()))


def distribution(values: Iterable[float]) -> list[float]:
    """The percentiles at ``DISTRIBUTION_POINTS``; empty of no values."""
    seconds = np.fromiter(values, dtype=np.float64)
    return [float(value) for value in np.percentile(seconds, DISTRIBUTION_POINTS)] if seconds.size else []


def ttfts(outcomes: Iterable[Outcome]) -> Iterator[float]:
    """Seconds to the first token, of every request that has one."""
    return (outcome.chunk_s[0] - outcome.sent_s for outcome in outcomes if outcome.chunk_s)


def tpots(outcomes: Iterable[Outcome]) -> Iterator[float]:
    """Mean seconds between tokens, of every request that has two."""
    return (tpot for outcome in outcomes if (tpot := tpot_of(outcome)) is not None)


def tpot_of(outcome: Outcome) -> float | None:
    """Mean seconds between the tokens of one request; None when it has fewer than two."""
    gaps = outcome.num_tokens - 1
    return (outcome.chunk_s[-1] - outcome.chunk_s[0]) / gaps if gaps > 0 else None


def token_gaps(outcomes: Iterable[Outcome]) -> Iterator[float]:
    """Seconds between every two tokens of a request, counted as the server counts them."""
    for outcome in outcomes:
        yield from itertools.repeat(0.0, outcome.chunk_tokens[0] - 1 if outcome.chunk_tokens else 0)
        for (before, after), tokens in zip(itertools.pairwise(outcome.chunk_s), outcome.chunk_tokens[1:], strict=True):
            yield from itertools.repeat((after - before) / tokens, tokens)


def e2es(outcomes: Iterable[Outcome]) -> Iterator[float]:
    """Seconds to the end of the stream."""
    return (outcome.ended_s - outcome.sent_s for outcome in outcomes)


def is_good(outcome: Outcome, slo: Slo) -> bool:
    """Whether a request completed and kept every limit."""
    if outcome.code != OK or _short(outcome) or not outcome.chunk_s:
        return False
    measured = (
        (outcome.chunk_s[0] - outcome.sent_s, slo.ttft_s),
        (tpot_of(outcome) or 0.0, slo.tpot_s),
        (outcome.ended_s - outcome.sent_s, slo.e2e_s),
    )
    return all(limit is None or value <= limit for value, limit in measured)


def _goodput(outcomes: Sequence[Outcome], duration_s: float, slo: Slo) -> Goodput:
    good = sum(is_good(outcome, slo) for outcome in outcomes)
    return Goodput(good, good / len(outcomes) if outcomes else 0.0, good / duration_s)


def _short(outcome: Outcome) -> bool:
    return outcome.num_tokens < outcome.planned.output_tokens


def _hops(outcomes: Iterable[Outcome]) -> Iterator[float]:
    return (
        outcome.chunk_s[0] - outcome.sent_s - outcome.server_ttft_s
        for outcome in outcomes
        if outcome.chunk_s and outcome.server_ttft_s is not None
    )
