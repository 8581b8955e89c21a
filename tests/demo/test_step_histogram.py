"""The demo's proof reads histograms right: exact values, and only those it can be sure of."""

from __future__ import annotations

import math

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client import Histogram as Metric

from loraplex.demo.histogram import Histogram, bucket_label

BUCKETS = (0, 1, 2, 3, 4, 6, 8)


def scrape(values: list[int], name: str = "loraplex_step_adapters") -> str:
    registry = CollectorRegistry()
    metric = Metric(name, "help", buckets=BUCKETS, registry=registry)
    Metric(f"{name}_more", "another that begins alike", buckets=BUCKETS, registry=registry).observe(5)
    Counter("loraplex_step_things", "no histogram", registry=registry).inc()
    for value in values:
        metric.observe(value)
    return generate_latest(registry).decode()


def test_counts_each_bucket_of_the_named_metric() -> None:
    histogram = Histogram.parse(scrape([0, 5, 5, 2, 9, 9, 9]), "loraplex_step_adapters")
    assert histogram.rows() == [(-math.inf, 0.0, 1), (1.0, 2.0, 1), (4.0, 6.0, 2), (8.0, math.inf, 3)]


def test_what_came_since_an_earlier_scrape() -> None:
    earlier = Histogram.parse(scrape([5, 1]), "loraplex_step_adapters")
    later = Histogram.parse(scrape([5, 1, 5, 0]), "loraplex_step_adapters")
    assert later.since(earlier).rows() == [(-math.inf, 0.0, 1), (4.0, 6.0, 1)]


@pytest.mark.parametrize(
    ("value", "values", "sure"),
    [
        (5, [5, 5, 4], 2),  # 5 shares its bucket with 6 only, and 5 is the most there can be
        (6, [6, 6], 0),  # those might be fives
        (4, [4, 3], 1),
        (9, [9], 1),  # the open bucket begins right after 8
    ],
)
def test_counts_the_greatest_value_only_when_its_bucket_takes_no_smaller_one(
    value: int, values: list[int], sure: int
) -> None:
    assert Histogram.parse(scrape(values), "loraplex_step_adapters").at(value) == sure


def test_a_missing_metric_counts_nothing() -> None:
    histogram = Histogram.parse("# nothing here\n", "loraplex_step_adapters")
    assert histogram.rows() == []
    assert histogram.at(5) == 0


def test_labels_are_summed() -> None:
    text = 'm_bucket{phase="decode",le="1.0"} 2.0\nm_bucket{phase="mixed",le="1.0"} 3.0\n'
    assert Histogram.parse(text, "m").rows() == [(-math.inf, 1.0, 5)]


@pytest.mark.parametrize(
    ("above", "bound", "label"),
    [(-math.inf, 0, "0"), (3, 4, "4"), (4, 6, "5-6"), (8, math.inf, "9 or more"), (-math.inf, 2, "0-2")],
)
def test_labels_name_whole_numbers(above: float, bound: float, label: str) -> None:
    assert bucket_label(above, bound) == label
