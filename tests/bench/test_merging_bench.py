"""``python -m bench.merging`` on a tiny model: every section to its end, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.engine.record import BASE
from bench.merging.__main__ import main
from bench.merging.merged import ITSELF, MERGED
from tests.servers import tiny_base

QUICK = (
    "--streams",
    "2",
    "--stream-tokens",
    "41",
    "--rounds",
    "1",
    "--tokens",
    "4",
    "--repeats",
    "1",
    "--threads",
    "1",
)


def test_both_sections_run_and_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "made.json"
    monkeypatch.setenv("COLUMNS", "200")
    assert (
        main(["--model", str(tiny_base(tmp_path)), *QUICK, "--works", "merge cat,export peft", "--out", str(out)]) == 0
    )
    document = json.loads(out.read_text())
    assert [goal["least"] for goal in document["goals"]] == [0.97, 0.97]  # at batch 1 and 16
    assert {(sample["case"]["batch"], sample["case"]["mix"]) for sample in document["samples"]} == {
        (batch, mix) for batch in (1, 16) for mix in (BASE, ITSELF, MERGED)
    }
    # what is timed begins behind the first token of each row
    assert {sample["tokens"] for sample in document["samples"] if sample["case"]["batch"] == 1} == {3}
    measures = {measure["name"]: measure for measure in document["measures"]}
    assert list(measures) == ["p99 gap, quiet", "p99 gap beside merge cat", "p99 gap beside export peft"]
    assert [measure["most"] for measure in measures.values()] == [None, 1.5, 1.5]
    assert all("done" in measure["detail"] for name, measure in measures.items() if "beside" in name)
    assert document["versions"]["commit"]
    assert "decode, batch 16: merged / base" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--works", "merge,export peft"], "--works merge,export peft: allowed are merge cat, "),
        (["--stream-tokens", "40"], "--stream-tokens 40: must be 41 or more"),
        (["--repeats", "0"], "--repeats 0: must be 1 or more"),
        (["--model", "nowhere"], "--model nowhere: no checkpoint directory"),
        (["--only", "speed"], "--only: invalid choice: 'speed'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(wrong)
    assert said in " ".join(capsys.readouterr().err.split())
