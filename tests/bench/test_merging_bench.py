"""``python -m bench.merging`` on a tiny model: every section to its end, what it writes, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.engine.record import BASE
from bench.engine.workload import make_adapters
from bench.merging.__main__ import main
from bench.merging.memory import MemoryPlan, memory
from bench.merging.merged import ITSELF, MERGED
from bench.merging.methods import EQUAL_RANKS, merges_of
from tests.servers import tiny_base

#: streams long enough for the work to end once beside them, on a busy machine, too
QUICK = [
    *("--methods", "cat,ties_svd", "--works", "merge cat,export peft", "--large-site", "9000x600"),
    *("--streams", "2", "--stream-tokens", "160", "--rounds", "1"),
    *("--steps", "3", "--repeats", "2", "--threads", "1"),
]
MERGES = ["cat", "cat svd_rank=16", "cat max_error=0.1", "ties_svd", "ties_svd svd_clamp=0.99"]


@dataclass(frozen=True)
class Ran:
    """What a run wrote, and what it showed."""

    document: Mapping[str, Any]
    shown: str

    def measures(self, beginning: str) -> dict[str, Any]:
        """Those whose names begin so, by the rest of them."""
        measures = {measure["name"]: measure for measure in self.document["measures"]}
        return {name.removeprefix(beginning): one for name, one in measures.items() if name.startswith(beginning)}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """All sections."""
    folder, shown = tmp_path_factory.mktemp("bench"), io.StringIO()
    out = folder / "made.json"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setenv("COLUMNS", "200")
        assert main(["--model", str(tiny_base(folder)), *QUICK, "--out", str(out)]) == 0
    return Ran(json.loads(out.read_text()), shown.getvalue())


def test_each_merge_is_timed_against_its_goal(ran: Ran) -> None:
    merges = ran.measures("merge ")
    assert list(merges) == MERGES
    assert {(merge["unit"], merge["most"]) for merge in merges.values()} == {("s", 5.0)}
    assert all(merge["value"] > 0 for merge in merges.values())
    assert "merge ties_svd svd_clamp=0.99" in ran.shown


def test_a_merged_adapter_decodes_beside_the_base_and_itself(ran: Ran) -> None:
    assert [goal["least"] for goal in ran.document["goals"]] == [0.97, 0.97]  # at batch 1 and 16
    for goal in ran.document["goals"]:
        assert len(goal["ratios"]) == 2
        assert goal["interval"] == [min(goal["ratios"]), max(goal["ratios"])]
    samples = [(one["case"]["batch"], one["case"]["mix"], one["tokens"]) for one in ran.document["samples"]]
    # a step's
    made = [(batch, mix, batch) for batch in (1, 16) for mix in (BASE, ITSELF, MERGED)]
    assert sorted(samples) == sorted(2 * made)
    assert "decode, batch 16: merged / base" in ran.shown


def test_the_peak_of_each_merge_and_export_is_counted(ran: Ran) -> None:
    merges, exports = ran.measures("peak of merge "), ran.measures("peak of export ")
    large = {name: merges.pop(name) for name in list(merges) if name.endswith(", 9000 x 600")}
    assert list(merges) == MERGES
    assert [merge["most"] for merge in merges.values()] == [0.1, 0.1, 0.1, 1.0, 1.0]
    tensors = ran.measures("largest tensor of merge ")
    assert list(tensors) == MERGES[:3]  # those that are to form no dense matrix
    assert {one["most"] for one in tensors.values()} == {0.9}
    assert list(large) == [f"{name}, 9000 x 600" for name in MERGES[:-1]]
    assert all(one["value"] < 1 for one in large.values())
    assert list(exports) == ["peft", "peft, a merge", "merged"]
    assert {export["most"] for export in exports.values()} == {1.0}
    assert all("of one thread" in merge["detail"] for merge in merges.values())
    # the dense change of each input, and what becomes of it
    assert merges["ties_svd"]["value"] > 2
    assert all(one["value"] > 0 for one in (*merges.values(), *exports.values()))


def test_trained_adapters_peaks_are_counted_where_changes_are_dense(tmp_path: Path) -> None:
    model = tiny_base(tmp_path)
    some = make_adapters(model, tmp_path / "some", EQUAL_RANKS)
    trained = dict(list(some.items())[:2])
    plan = MemoryPlan(model, "float32", some, trained, merges_of(("cat", "dare_ties_svd")), (1024, 600))
    turns: list[str] = []
    measures = {measure.name: measure for measure in memory(plan, tmp_path, turns.append)}
    assert len(turns) == plan.num_turns
    assert [name for name in measures if "trained" in name] == ["peak of merge dare_ties_svd, trained"]
    of_all, of_two = (measures[f"peak of merge dare_ties_svd{which}"] for which in ("", ", trained"))
    assert 0 < of_two.value < of_all.value  # a bit for each value of two inputs, not of four
    assert of_two.most == 1.0


def test_streams_are_watched_beside_each_work(ran: Ran) -> None:
    gaps = ran.measures("p99 gap")
    assert list(gaps) == [", quiet", " beside merge cat", " beside export peft"]
    assert [gap["most"] for gap in gaps.values()] == [None, 1.5, 1.5]
    assert all("done" in gap["detail"] for name, gap in gaps.items() if "beside" in name)


def test_the_file_says_what_was_measured(ran: Ran) -> None:
    assert ran.document["versions"]["commit"]
    assert ran.document["workload"]["merged_ranks"] == [16, 16, 16, 16]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--works", "merge,export peft"], "--works merge,export peft: allowed are merge cat, "),
        (["--methods", "cat,mean"], "--methods cat,mean: allowed are linear, cat, "),
        (["--large-site", "4096"], "--large-site: '4096' is not two numbers, 64 or more, as in 14336x4096"),
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


def test_trained_adapters_are_those_of_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made.json"
    assert main(["--only", "trained", "--methods", "cat,ties_svd", "--rounds", "1", "--out", str(out)]) == 0
    (merge,) = json.loads(out.read_text())["measures"]
    assert merge["name"] == "merge ties_svd, trained"  # cat goes through no dense change
    assert (merge["unit"], merge["most"]) == ("s", 5.0)
    assert merge["value"] > 0
    with pytest.raises(SystemExit, match="2"):
        main(["--only", "trained", "--model", str(tiny_base(tmp_path))])
    assert "are of the demo base, which is the default" in " ".join(capsys.readouterr().err.split())
