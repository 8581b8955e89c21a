"""The harness's arithmetic on timestamps made by hand, and what it compares with the server's metrics."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from bench.serve.compare import Comparison, Scrape, compare
from bench.serve.load import UNFINISHED, Outcome
from bench.serve.measures import distribution, is_good, summarize, token_gaps
from bench.serve.schedule import Planned
from bench.serve.workload import Slo


def outcome(
    chunks: Sequence[tuple[float, int]],
    *,
    code: str = "OK",
    sent_s: float = 1.0,
    ended_s: float = 2.0,
    asked: int | None = None,
    adapter: str = "a",
) -> Outcome:
    """A request of 10 prompt tokens whose chunks came at (seconds, tokens)."""
    tokens = sum(count for _, count in chunks)
    planned = Planned(0, None, adapter, range(10), tokens if asked is None else asked)
    times, counts = [at for at, _ in chunks], [count for _, count in chunks]
    return Outcome(planned, sent_s, code, "", times, counts, ended_s, cached_prompt_tokens=4)


#: TTFT 0.2, gaps 0.1 0.1 (one token each) and 0.15 0.15 (two at once), TPOT 0.125, end to end 1.0
STREAM = outcome([(1.2, 1), (1.3, 1), (1.4, 1), (1.7, 2)])
#: TTFT 0.4, one gap of 0 (it came with the first), TPOT 0
BURST = outcome([(1.4, 2)], ended_s=1.5)
FAILED = outcome([(1.1, 1)], code="UNAVAILABLE", ended_s=1.2, asked=5)
CUT_OFF = outcome([(1.1, 1)], code=UNFINISHED, ended_s=9.0, asked=5)


def test_latencies_of_known_timestamps() -> None:
    got = summarize([STREAM, BURST], 2.0, None)
    assert got.ttft_s is not None
    assert got.tpot_s is not None
    assert got.itl_s is not None
    assert got.e2e_s is not None
    assert (got.ttft_s.mean, got.ttft_s.p50, got.ttft_s.max) == pytest.approx((0.3, 0.3, 0.4))
    assert got.ttft_s.p90 == pytest.approx(0.38)  # linear between the ranks: 0.2 + 0.9 * 0.2
    assert got.ttft_s.p99 == pytest.approx(0.398)
    assert (got.tpot_s.count, got.tpot_s.mean) == (2, pytest.approx(0.0625))
    assert sorted(token_gaps([STREAM, BURST])) == pytest.approx([0.0, 0.1, 0.1, 0.15, 0.15])
    assert (got.itl_s.count, got.itl_s.p50) == (5, pytest.approx(0.1))
    assert got.e2e_s.mean == pytest.approx(0.75)


def test_rates_count_completed_requests_over_the_whole_time() -> None:
    got = summarize([STREAM, BURST, FAILED, CUT_OFF], 4.0, None)
    assert (got.sent, got.completed, got.failed, got.cut_off) == (4, 2, 1, 1)
    assert got.errors == {"UNAVAILABLE": 1}
    assert (got.prompt_tokens, got.output_tokens, got.cached_prompt_tokens) == (20, 7, 8)
    assert (got.requests_per_s, got.output_tokens_per_s, got.total_tokens_per_s) == (0.5, 1.75, 6.75)
    assert got.ttft_s is not None
    assert got.ttft_s.count == 2, "failed and cut-off requests have no place in a latency"


def test_goodput_has_every_request_sent_below_it() -> None:
    got = summarize([STREAM, BURST, FAILED, CUT_OFF], 4.0, Slo(ttft_s=0.3)).goodput
    assert got is not None
    assert (got.good, got.share, got.requests_per_s) == (1, 0.25, 0.25)


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(ttft_s=0.21), True),
        (Slo(ttft_s=0.19), False),
        (Slo(tpot_s=0.126), True),
        (Slo(tpot_s=0.124), False),
        (Slo(e2e_s=1.001), True),
        (Slo(e2e_s=0.999), False),
        (Slo(ttft_s=0.21, tpot_s=0.124), False),
    ],
    ids=str,
)
def test_every_limit_must_be_kept(slo: Slo, good: bool) -> None:
    assert is_good(STREAM, slo) is good


def test_an_answer_that_is_too_short_is_told_and_is_not_good() -> None:
    short = outcome([(1.2, 3)], asked=4)
    assert summarize([short], 1.0, None).short == 1
    assert not is_good(short, Slo(ttft_s=9))


def test_nothing_measured_gives_no_latency_rather_than_zero() -> None:
    got = summarize([FAILED], 1.0, Slo(ttft_s=1))
    assert (got.ttft_s, got.tpot_s, got.itl_s, got.e2e_s) == (None, None, None, None)
    assert got.goodput is not None
    assert got.goodput.share == 0.0
    assert distribution([]) == []


def test_a_distribution_runs_from_least_to_most() -> None:
    points = distribution([3.0, 1.0, 2.0])
    assert (len(points), points[0], points[100], points[-1]) == (201, 1.0, 2.0, 3.0)


def server_counts(adapter: str, **changed: float) -> Scrape:
    """What the server would count for STREAM and BURST, its TTFT 2 ms shorter."""
    values = {
        "loraplex_requests_total": 2.0,
        "loraplex_prompt_tokens_total": 20.0,
        "loraplex_generation_tokens_total": 7.0,
        "loraplex_time_to_first_token_seconds_sum": 0.596,
        "loraplex_time_to_first_token_seconds_count": 2.0,
        "loraplex_inter_token_latency_seconds_sum": 0.5,
        "loraplex_inter_token_latency_seconds_count": 5.0,
        "loraplex_e2e_latency_seconds_sum": 1.497,
        "loraplex_e2e_latency_seconds_count": 2.0,
    } | changed
    return Scrape(
        {(name, adapter, "OK" if name == "loraplex_requests_total" else ""): value for name, value in values.items()}
    )


def compared(window: Scrape) -> Comparison:
    return compare("http://x/metrics", window, [STREAM, BURST])


def test_client_and_server_agree() -> None:
    comparison = compared(server_counts("a"))
    assert comparison.all_ok, comparison.values
    assert [value.adapter for value in comparison.values] == ["a"] * 7 + ["all"] * 7
    ttft = next(value for value in comparison.values if value.measure == "mean TTFT")
    assert ttft.difference == pytest.approx(0.3 / 0.298 - 1)


@pytest.mark.parametrize(
    ("changed", "measure"),
    [
        ({"loraplex_requests_total": 3.0}, "completed"),
        ({"loraplex_prompt_tokens_total": 21.0}, "prompt"),
        ({"loraplex_generation_tokens_total": 6.0}, "generated"),
        ({"loraplex_time_to_first_token_seconds_sum": 0.58}, "mean TTFT"),
        ({"loraplex_inter_token_latency_seconds_sum": 0.52}, "mean ITL"),
        ({"loraplex_e2e_latency_seconds_sum": 1.4}, "mean E2E"),
    ],
)
def test_a_number_that_differs_is_marked(changed: dict[str, float], measure: str) -> None:
    wrong = {value.measure for value in compared(server_counts("a", **changed)).values if not value.ok}
    assert measure in wrong
    assert wrong <= {measure, "ended"}


def test_an_adapter_that_the_server_never_saw_differs() -> None:
    assert not compared(server_counts("b")).all_ok


def test_adapters_beyond_the_servers_labels_are_compared_as_other() -> None:
    comparison = compared(server_counts("other"))
    assert comparison.all_ok, comparison.values
    assert {value.adapter for value in comparison.values} == {"other", "all"}


def test_a_window_is_what_was_counted_since() -> None:
    later = Scrape({key: 3 * value for key, value in server_counts("a").samples.items()})
    assert later.since(Scrape({})).samples == later.samples
    assert compared(server_counts("a")).all_ok
    doubled = later.since(server_counts("a"))
    assert doubled.value("loraplex_requests_total", "all") == 4
    assert doubled.mean("loraplex_inter_token_latency_seconds", "a") == pytest.approx(0.1)
