"""The speed table's arithmetic: ratios are taken within a repeat, and the file says how they came about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from bench.engine.record import LORA, Case, Goal, Measure, Record, Sample, interval
from bench.engine.table import show

OURS, THEIRS = Case("engine", 32), Case("transformers", 32)
GOAL = Goal("ours / theirs", OURS, THEIRS, least=1.2)


def record() -> Record:
    # the machine was busy in repeat 2: both sides were slow in it, the ratio was not
    samples = [
        Sample(OURS, 1, 600, 1.0),
        Sample(THEIRS, 1, 400, 1.0),
        Sample(OURS, 2, 600, 10.0),
        Sample(THEIRS, 2, 400, 10.0),
        Sample(OURS, 3, 600, 1.0),
        Sample(THEIRS, 3, 300, 1.0),
    ]
    return Record(command=["python", "-m", "bench.engine"], workload={"num_tokens": 64}, samples=samples)


def test_ratios_pair_the_samples_of_a_repeat() -> None:
    assert record().ratios(GOAL) == [1.5, 1.5, 2.0]


def test_a_case_that_was_not_run_gives_no_ratio() -> None:
    assert record().ratios(Goal("x", OURS, Case("PEFT", 32, mix=LORA), least=3.0)) == []


@pytest.mark.parametrize(
    ("count", "outside"),  # of that many on each side; from tables of the sign test at 5 %
    [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (20, 5), (25, 7), (60, 21)],
)
def test_the_median_of_many_ratios_lies_between_the_middle_ones(count: int, outside: int) -> None:
    ratios = [float(place) for place in range(count)]
    assert interval(ratios[::-1]) == (outside, count - 1 - outside)


def test_the_file_holds_machine_versions_command_and_every_sample(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    written = record()
    written.measures.append(Measure("warm start", 4.0, "s", most=12.0))
    written.write(path, (GOAL,))
    document = json.loads(path.read_text())
    goal = {"name": "ours / theirs", "ratios": [1.5, 1.5, 2.0], "median": 1.5, "interval": [1.5, 2.0], "least": 1.2}
    assert document["goals"] == [goal]
    assert document["machine"]["cores"] >= 1
    assert document["versions"]["torch"]
    assert document["command"] == ["python", "-m", "bench.engine"]
    assert len(document["samples"]) == 6
    assert document["samples"][2]["tokens_per_s"] == 60.0
    assert [entry.name for entry in path.parent.iterdir()] == ["run.json"]


def test_the_table_says_what_is_met_and_what_is_missed() -> None:
    console = Console(record=True, width=140)
    shown = record()
    shown.measures += [Measure("warm start", 4.0, "s", most=12.0), Measure("gap", 3.0, "steps", most=2.0)]
    show(shown, (THEIRS, OURS), (GOAL,), console)
    lines = console.export_text().splitlines()
    assert any("engine, base" in line and "600 (60 - 600)" in line for line in lines)
    assert any("ours / theirs" in line and "1.500 (1.500 - 2.000)" in line and "met" in line for line in lines)
    assert any("warm start" in line and "met" in line for line in lines)
    assert any("gap" in line and "missed" in line for line in lines)
