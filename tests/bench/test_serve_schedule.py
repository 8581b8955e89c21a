"""Schedules: reproduced by their seed, new in every repeat, and distributed as asked."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import pairwise

import pytest

from bench.serve.schedule import Planned, base_only, make_schedule, warm_up_schedule
from bench.serve.workload import Arrival, Lengths, Popularity, Workload

NAMES = ("a", "b", "c", "d")
VOCAB_SIZE = 300
UNIFORM = Popularity("uniform")
CLOSED = Arrival("closed", concurrency=4)


def workload(
    *,
    popularity: Popularity = UNIFORM,
    arrival: Arrival = CLOSED,
    num_requests: int = 4000,
    seed: int = 0,
    warmup: int = 0,
) -> Workload:
    return Workload(
        adapters=NAMES,
        popularity=popularity,
        arrival=arrival,
        prompt_tokens=Lengths(3, 9),
        output_tokens=Lengths(2, 5),
        num_requests=num_requests,
        seed=seed,
        baseline="none",
        repeats=1,
        warmup=warmup,
    )


def schedule(work: Workload, repeat: int = 1) -> tuple[Planned, ...]:
    return make_schedule(work, repeat, VOCAB_SIZE)


def counts(kind: Popularity) -> Counter[str]:
    return Counter(planned.adapter for planned in schedule(workload(popularity=kind)))


def test_a_seed_and_a_repeat_give_the_same_requests_and_others_others() -> None:
    assert schedule(workload()) == schedule(workload())
    prompts = [
        [list(planned.prompt) for planned in schedule(workload(num_requests=50, seed=seed), repeat)]
        for seed, repeat in ((0, 1), (0, 2), (1, 1))
    ]
    assert prompts[0] != prompts[1] != prompts[2] != prompts[0]


def test_another_popularity_leaves_prompts_and_lengths_as_they_were() -> None:
    skewed, uniform = schedule(workload(popularity=Popularity("skewed", 2.0))), schedule(workload())
    assert [planned.prompt for planned in skewed] == [planned.prompt for planned in uniform]
    assert [planned.output_tokens for planned in skewed] == [planned.output_tokens for planned in uniform]


def test_lengths_and_ids_stay_within_what_was_asked() -> None:
    planned = schedule(workload())
    assert {len(one.prompt) for one in planned} == set(range(3, 10))
    assert {one.output_tokens for one in planned} == set(range(2, 6))
    ids = {token for one in planned for token in one.prompt}
    assert min(ids) >= 0
    assert max(ids) < VOCAB_SIZE
    assert len(ids) > 0.99 * VOCAB_SIZE


def test_popularity() -> None:
    assert counts(Popularity("identical")) == {"a": 4000}
    assert counts(Popularity("distinct")) == dict.fromkeys(NAMES, 1000)
    assert all(850 < count < 1150 for count in counts(Popularity("uniform")).values())
    skewed = counts(Popularity("skewed", 1.0))
    # weights 1, 1/2, 1/3, 1/4 of 25/12
    for name, share in zip(NAMES, (0.48, 0.24, 0.16, 0.12), strict=True):
        assert skewed[name] / 4000 == pytest.approx(share, abs=0.03)


def test_distinct_requests_in_flight_differ() -> None:
    planned = schedule(workload(popularity=Popularity("distinct")))
    assert all(len({one.adapter for one in planned[at : at + 4]}) == 4 for at in range(0, 3990, 7))


@pytest.mark.parametrize(
    ("arrival", "cv"),
    [
        (Arrival("poisson", rate=8.0), 1.0),
        (Arrival("gamma", rate=8.0, cv=0.25), 0.25),
        (Arrival("gamma", rate=8.0, cv=3.0), 3.0),
    ],
    ids=str,
)
def test_open_loops_keep_rate_and_spread(arrival: Arrival, cv: float) -> None:
    due = [one.due_s for one in schedule(workload(arrival=arrival, num_requests=20_000))]
    times = [at for at in due if at is not None]
    gaps = [after - before for before, after in pairwise(times)]
    assert times[0] == 0.0
    assert len(times) == 20_000
    assert min(gaps) >= 0
    assert 1 / statistics.mean(gaps) == pytest.approx(8.0, rel=0.08)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.1)


def test_a_closed_loop_has_no_times() -> None:
    assert {one.due_s for one in schedule(workload())} == {None}


def test_the_base_side_sends_the_same_without_adapters() -> None:
    planned = schedule(workload(num_requests=20))
    alone = base_only(planned)
    assert {one.adapter for one in alone} == {""}
    assert [(one.prompt, one.output_tokens) for one in alone] == [(one.prompt, one.output_tokens) for one in planned]


def test_warm_up_touches_the_base_and_every_adapter_with_prompts_of_its_own() -> None:
    work = workload(num_requests=3, warmup=10)
    warm = warm_up_schedule(work, VOCAB_SIZE)
    assert [one.adapter for one in warm] == ["", "a", "b", "c", "d"] * 2
    assert not {tuple(one.prompt) for one in warm} & {tuple(one.prompt) for one in schedule(work)}
    assert warm_up_schedule(workload(), VOCAB_SIZE) == ()
