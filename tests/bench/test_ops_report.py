"""The op benchmarks: every backend and formulation right at tiny sizes, wrong ones refused, numbers kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import bench.ops.__main__ as command
from bench.ops import attention, attention_formulations, conv, lora, lora_formulations, mixer_formulations, ssd
from bench.ops.op_tests import RedTests, check_tests
from bench.ops.options import Options, resolve_device
from bench.ops.report import Report
from bench.ops.shapes import SHAPES, TINY, even_traffic
from bench.ops.table import show
from bench.ops.timing import HostStopwatch, WrongResult, stopwatch_for
from loraplex_kernels.segments import SegmentPlan

FEW = replace(TINY, traffics=TINY.traffics[1:3], attention_steps=TINY.attention_steps[1:])
Run = Callable[..., Report]
OPTIONS = Options(("cpu", "reference"), torch.device("cpu"), torch.float32, FEW, repeats=1, calls=1)


@dataclass
class ColdStopwatch(HostStopwatch):
    """The host's clock, on a device with a cache and a known bandwidth."""

    cold_bytes: int = 30_000

    def copy_bytes_per_s(self) -> float | None:
        return 1e9


def ways(report: Report) -> list[str]:
    return [timing.way for timing in report.rows[0].timings]


def test_lora_reports_every_layer_of_every_traffic() -> None:
    report = lora.run(OPTIONS)
    assert ways(report) == ["cpu", "reference", *lora_formulations.FORMULATIONS]
    assert [(row.step, row.layer) for row in report.rows] == [
        (traffic.name, layer) for traffic in FEW.traffics for layer in ("qkv", "o", "gate_up", "down")
    ]
    assert all(timing.us > 0 for row in report.rows for timing in row.timings)
    assert report.copy_bytes_per_s is None


def test_lora_counts_the_bytes_of_the_adapters_in_use() -> None:
    only = replace(OPTIONS, shapes=replace(FEW, traffics=(replace(even_traffic(1, 1), num_slots=3),)))
    qkv = lora.run(only).rows[0]
    # rank 4: A of three parts of 64 columns, B of 64 + 32 + 32 rows; x, and y read and written, in float32
    assert qkv.num_bytes == 4 * (3 * 4 * 64 + 4 * 128 + 64 + 2 * 128)


def test_attention_reports_every_step() -> None:
    report = attention.run(OPTIONS)
    expected = ["cpu", "cpu: prepare", "reference", "reference: prepare", *attention_formulations.FORMULATIONS]
    assert ways(report) == expected
    assert [row.step for row in report.rows] == [step.name for step in FEW.attention_steps]
    # contexts of 18 and 25, 10 rows; 2 heads of keys and of values, 4 of queries and of output, 16 wide, float32
    assert report.rows[1].num_bytes == 4 * 16 * ((43 + 10) * 2 * 2 + 10 * 4 * 2)


def test_conv_reports_every_step() -> None:
    report = conv.run(OPTIONS, HostStopwatch())
    assert ways(report) == ["cpu", "cpu: prepare", "reference", "reference: prepare", "torch"]
    assert [row.step for row in report.rows] == [step.name for step in FEW.state_steps]
    assert report.shapes == FEW.mixer.name
    # 32 channels of x and 2 x 2 x 16 of B and C; 3 decodes in and out, 3 rows of states twice each, a kernel and a bias
    assert report.rows[1].num_bytes == 4 * 96 * (3 * 2 + 3 * 3 * 2 + 4 + 1)


def test_ssd_reports_scan_and_gate_of_every_step() -> None:
    report = ssd.run(OPTIONS, HostStopwatch())
    assert ways(report) == ["cpu", "cpu: prepare", "reference", "reference: prepare", "torch"]
    assert [(row.step, row.layer) for row in report.rows] == [
        (step.name, part) for step in FEW.state_steps for part in ("scan", "gate")
    ]
    scan, gate = report.rows[2:4]
    # 3 rows: x and y of 4 heads of 8, B and C of 2 groups of 16, dt; 3 states of 4 x 8 x 16 read and written
    assert scan.num_bytes == 4 * (3 * (2 * 32 + 2 * 32 + 4) + 2 * 3 * 4 * 8 * 16)
    assert gate.num_bytes == 4 * 32 * (3 * 3 + 1)


def test_a_wrong_scan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {**mixer_formulations.FORMULATIONS, "scan": mixer_formulations.FORMULATIONS["gate"]}
    monkeypatch.setattr(ssd, "FORMULATIONS", wrong)
    with pytest.raises(WrongResult, match=r"^torch, 1 decode: .* times the tolerance"):
        ssd.run(OPTIONS, HostStopwatch())


def test_on_a_cpu_states_come_from_memory() -> None:
    stopwatch = stopwatch_for(torch.device("cpu"), cold_host=True)
    assert stopwatch.cold_bytes > 0
    assert HostStopwatch().copy_bytes_per_s() is None


@pytest.mark.parametrize("run", [lora.run, attention.run, conv.run, ssd.run])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_ways_agree_in_half_precision(run: Run, dtype: torch.dtype) -> None:
    assert run(replace(OPTIONS, dtype=dtype), HostStopwatch()).dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("run", [lora.run, attention.run, conv.run, ssd.run])
def test_cold_inputs_are_rotated_and_compared_with_a_copy(run: Run) -> None:
    report = run(OPTIONS, ColdStopwatch())
    for row in report.rows:
        assert row.num_sets == -(-30_000 // row.num_bytes)
        assert report.limit_us(row) == pytest.approx(row.num_bytes / 1e3)
        timing = row.timings[0]
        assert report.share(row, timing) == pytest.approx(row.num_bytes / 1e3 / timing.us)
        assert report.share(row, replace(timing, replay_us=1.0)) == pytest.approx(row.num_bytes / 1e3)


def test_a_wrong_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(plan: SegmentPlan, slots: lora_formulations.Slots) -> lora_formulations.Add:
        return lora_formulations.segment_loop(SegmentPlan(plan.num_rows, plan.segments[:-1]), slots)

    monkeypatch.setattr(lora, "FORMULATIONS", {"forgetful": forgetful})
    with pytest.raises(WrongResult, match=r"^forgetful, 5 rows, 3 adapters, qkv: .* times the tolerance"):
        lora.run(OPTIONS)


def test_a_backend_that_cannot_run_is_named() -> None:
    with pytest.raises(ValueError, match="lora backend 'abacus' cannot run: there is no such backend"):
        lora.run(replace(OPTIONS, backends=("abacus",)))


def test_cuda_without_a_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ValueError, match="device cuda: torch finds none here"):
        resolve_device("cuda")


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes_name_their_steps_apart(name: str) -> None:
    shapes = SHAPES[name]
    for steps in (shapes.traffics, shapes.attention_steps, shapes.state_steps):
        names = [step.name for step in steps]
        assert len(set(names)) == len(names)
    for traffic in shapes.traffics:
        assert all(term.slot < traffic.num_slots for segment in traffic.plan.segments for term in segment.terms)


def test_the_command_writes_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "ops.json"
    words = f"bench.ops attention --shapes tiny --backend reference --dtype float32 --repeats 1 --calls 1 --json {path}"
    words += " --no-tests"
    monkeypatch.setattr("sys.argv", words.split())
    assert command.main() == 0
    document = json.loads(path.read_text())
    assert (document["op"], document["shapes"], document["device"]) == ("attention", "tiny", "cpu")
    assert [row["step"] for row in document["rows"]] == [step.name for step in TINY.attention_steps]
    assert document["versions"]["torch"] == torch.__version__
    assert TINY.attention_steps[0].name in capsys.readouterr().out


def test_the_command_says_what_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench.ops", "lora", "--no-tests", "--shapes", "tiny", "--backend", "cpu,abacus"])
    assert command.main() == 2
    assert "cannot run: lora backend 'abacus'" in " ".join(capsys.readouterr().err.split())


def test_a_table_shows_the_limit_and_the_share() -> None:
    report = replace(attention.run(OPTIONS), copy_bytes_per_s=4e12)
    timing = replace(report.rows[0].timings[0], us=20.0, replay_us=10.0)
    row = replace(report.rows[0], num_bytes=20_000_000, timings=(timing,))
    console = Console(width=200)
    with console.capture() as captured:
        show(replace(report, rows=(row,)), console)
    assert "5.0" in captured.get()
    assert "20 / 10.0 (50%)" in captured.get()


def test_nothing_is_reported_on_red_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tests" / "ops"
    folder.mkdir(parents=True)
    (folder / "test_green_op.py").write_text("def test_a(): pass\ndef test_b(): pass\n")
    (folder / "test_red_op.py").write_text("def test_a(): assert False, 'a wrong sum'\n")
    (folder / "test_empty_op.py").write_text("")
    assert check_tests("green", tmp_path) == 2
    with pytest.raises(RedTests, match=r"test_red_op.py: FAILED .*test_a"):
        check_tests("red", tmp_path)
    with pytest.raises(RedTests, match=r"test_empty_op.py"):
        check_tests("empty", tmp_path)

    def red(_op: str) -> int:
        raise RedTests("tests/ops/test_lora_op.py: FAILED [it]")

    monkeypatch.setattr(command, "check_tests", red)
    monkeypatch.setattr("sys.argv", ["bench.ops", "lora", "--shapes", "tiny", "--json", str(tmp_path / "out.json")])
    assert command.main() == 1
    assert not (tmp_path / "out.json").exists()
