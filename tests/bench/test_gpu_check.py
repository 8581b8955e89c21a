"""The GPU check on a machine without one: the whole dry run, and what it says when things go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.gpu_check import __main__ as command
from bench.gpu_check.report import Report, show_summary
from bench.gpu_check.section import Outcome, OutOfTime, Row, Section, Setting, run_section
from bench.ops.quant_matrices import STORED

ROOT = Path(__file__).parents[2]
SECTIONS = ["ceilings", "tests", "retention", "kinds", "quant", "ranks", "layer", "ops", "states"]


def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int | str | None, str]:
    """The exit code and all that is said of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
    try:
        code: int | str | None = command.main()
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out + said.err


def test_a_dry_run_goes_through_every_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # a dry run sets it: so that it is taken back
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of the processes that it starts
    code, said = run_here(monkeypatch, capsys, "--dry-run", "--out", str(tmp_path / "dry.json"))
    assert code == 0, said
    document = json.loads((tmp_path / "dry.json").read_text())
    assert [(s["name"], s["status"]) for s in document["sections"]] == [(name, "ok") for name in SECTIONS]
    assert all(section["rows"] for section in document["sections"])
    assert document["dry_run"] is True
    assert document["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(document["command"])
    retention = document["sections"][SECTIONS.index("retention")]["rows"]
    cells = {(r["backend"], r["rank"], r["batch"], r["distinct"]) for r in retention if "retention" in r}
    assert cells == {(b, 4, n, d) for b in ("triton", "triton-fused") for n, d in ((1, 1), (3, 1), (3, 2))}
    kinds = document["sections"][SECTIONS.index("kinds")]["rows"]
    changes = {row["kind"]: row["largest_change_of_a_logit"] for row in kinds if "kind" in row}
    assert len(changes) == 8
    assert min(changes.values()) > 0
    assert [(row["kinds"], row["batch"]) for row in kinds if "retention" in row] == [("all eight", 8), ("ia3", 8)]
    check_quant(document["sections"][SECTIONS.index("quant")]["rows"])
    check_ranks(document["sections"][SECTIONS.index("ranks")]["rows"])
    states = document["sections"][SECTIONS.index("states")]["rows"]
    assert {(row["op"], row["layer"]) for row in states} == {("conv", None), ("ssd", "scan"), ("ssd", "gate")}
    assert {row["way"] for row in states} == {"triton", "triton: prepare", "torch"}
    assert "nothing was measured" in said


def check_quant(rows: list[dict[str, object]]) -> None:
    """Every stored form beside its decoded weights, and a layer with its adapters in one launch and in two."""
    products = [row for row in rows if row.get("way") == "triton"]
    assert {row["stored"] for row in products} == set(STORED)
    assert [row["way"] for row in rows if row.get("distinct") and "stored" in row] == ["two launches", "joined"]
    served = [(row["backend"], row["batch"], row["distinct"]) for row in rows if "retention" in row]
    assert served == [("triton-fused", 1, 1)]


def check_ranks(rows: list[dict[str, object]]) -> None:
    """Two processes beside one: every step of the section was gone through."""
    tokens = [row for row in rows if row.get("what") == "tokens in float32"]
    assert [(row["ranks"], row["batch_of"]) for row in tokens] == [(2, "adapters of tables"), (2, "with own rows")]
    assert all(row["requests"] and not row["wrong_requests"] for row in tokens)
    [near] = [row for row in rows if row.get("what") == "logprobs in float32"]
    assert near["answers"] == near["equal_answers"] == 9
    cells = {(row["ranks"], row["batch"], row["distinct"]) for row in rows if "retention" in row}
    assert cells == {(ranks, *cell) for ranks in (1, 2) for cell in ((1, 1), (3, 2))}
    sums = {(row["what"], row["rows"]) for row in rows if "replay_us" in row}
    assert sums == {(f"one {what} over ranks", n) for what in ("sum", "gathering") for n in (1, 3)}


def test_a_dry_run_of_what_is_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # a dry run sets it: so that it is taken back
    code, said = run_here(monkeypatch, capsys, "--dry-run", "--only", "forms", "--out", str(tmp_path / "forms.json"))
    assert code == 0, said
    (section,) = json.loads((tmp_path / "forms.json").read_text())["sections"]
    forms = {row["form"].split(", ", 1)[1] for row in section["rows"]}
    assert forms == {"as it is", "splits of 1,024"}
    assert {row["form"].split(", ")[0] for row in section["rows"]} == {"triton", "triton-fused"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: the check would run")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    code, said = run_here(monkeypatch, capsys)
    assert code == 2
    assert "torch sees no CUDA device" in said
    assert "--dry-run" in said


def test_the_command_is_there() -> None:
    """As a user runs it, in the repository; all else is asked of it in this process."""
    line = [sys.executable, "-m", "bench.gpu_check", "--minutes", "0"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--minutes 0.0: allowed are" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dry-run", "--only", "speed"), "--only speed: the sections are ceilings, tests"),
        (("--minutes", "0"), "--minutes 0.0: allowed are"),
        (("--out", "/nowhere/at/all.json"), "there is no folder /nowhere/at"),
    ],
)
def test_wrong_options_are_named(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # a dry run sets it: so that it is taken back
    code, said = run_here(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in said


def setting(*, dry: bool = True, left_s: float = 60.0) -> Setting:
    return Setting(torch.device("cpu"), dry, time.monotonic() + left_s)


def rows_then(error: Exception | None) -> Section:
    def run(_: Setting) -> Iterator[Row]:
        yield {"value": 1.5}
        if error is not None:
            raise error

    return Section("some", run, 30.0)


def test_what_was_found_before_a_failure_is_kept() -> None:
    said: list[Row] = []
    outcome = run_section(rows_then(RuntimeError("no such kernel")), setting(), said.append)
    assert (outcome.status, outcome.error, outcome.rows) == ("failed", "RuntimeError: no such kernel", [{"value": 1.5}])
    assert "rows_then" not in outcome.error
    assert "no such kernel" in outcome.detail
    assert said == outcome.rows


def test_time_that_runs_out_is_no_failure_and_no_success() -> None:
    outcome = run_section(rows_then(OutOfTime("before rank 8")), setting(), lambda _: None)
    assert (outcome.status, outcome.error) == ("out of time", "before rank 8")
    late = run_section(rows_then(None), setting(dry=False, left_s=5), lambda _: None)
    assert late.status == "out of time"
    assert late.rows == []
    report = Report(["check"], setting(), [outcome])
    assert not report.passed(1)


def test_the_first_failure_is_printed_and_sections_not_run_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(["check"], setting(), [Outcome("one"), Outcome("two", "failed", error="ValueError: [bad] slot 7")])
    show_summary(Console(width=200), report, planned=["one", "two", "three"])
    shown = capsys.readouterr().out
    assert "failed first: two" in shown
    assert "[bad] slot 7" in shown
    assert "not run" in shown
    assert not report.passed(3)
