"""The section on ranks: where it is skipped, what it calls wrong, and that it ends whatever its engines do."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import psutil
import pytest
import torch
from rich.console import Console

from bench.gpu_check import __main__ as command
from bench.gpu_check import ranks, served
from bench.gpu_check.agreement import (
    NEAR_NATS,
    DifferentTokens,
    NothingToCompare,
    clear_ones,
    compare_near,
    compare_tokens,
)
from bench.gpu_check.decode import Steps
from bench.gpu_check.dummy import shape_of, write_config
from bench.gpu_check.group_sums import SumsFailed, check_captured, time_sums
from bench.gpu_check.report import Report, show_summary
from bench.gpu_check.section import Outcome, OutOfTime, Section, Setting, run_section
from bench.gpu_check.served import Answer, Hung, ServedEngine
from loraplex.config import Config
from loraplex.engine.client import EngineClient
from loraplex.engine.messages import StepReport, TokenEvent
from loraplex.parallel.group import SoloGroup
from loraplex.types import Request, TokenLogprob, TopLogprob


def setting(*, dry: bool = True, left_s: float = 100.0) -> Setting:
    return Setting(torch.device("cpu" if dry else "cuda"), dry, time.monotonic() + left_s)


# ---- where it is skipped ----


@pytest.mark.parametrize(
    ("gpus", "reason"),
    [
        ((), "needs two GPUs, none is here"),
        (("H200",), "needs two GPUs, one is here"),
        (("H200", "L4"), "needs two GPUs of one kind, here are H200 and L4: they make different random weights"),
        (("H200", "H200", "L4"), ""),
    ],
)
def test_it_says_what_a_machine_lacks(gpus: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index])
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert ranks.lacks(setting(dry=False)) == reason
    assert ranks.lacks(setting()) == ""
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert ranks.lacks(setting(dry=False)) == (reason or "needs a torch that was built with NCCL")


def test_a_section_that_is_skipped_is_neither_begun_nor_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    outcome = run_section(ranks.SECTION, setting(dry=False, left_s=1.0), lambda _: None)
    assert (outcome.status, outcome.reason) == ("skipped", "needs two GPUs, one is here")
    assert (outcome.error, outcome.rows, outcome.seconds) == ("", [], 0.0)


def test_a_skip_is_no_failure_and_never_ok(capsys: pytest.CaptureFixture[str]) -> None:
    skipped = Outcome("ranks", "skipped", reason="needs two [GPUs], one is here")
    assert Report(["check"], setting(), [skipped]).passed(1)
    assert not Report(["check"], setting(), [skipped, Outcome("ops", "failed", error="x")]).passed(2)
    assert not Report(["check"], setting(), [skipped, Outcome("ops", "out of time")]).passed(2)
    show_summary(Console(width=120), Report(["check"], setting(), [skipped]), planned=["ranks"])
    shown = capsys.readouterr().out
    assert shown.count("skipped") == 2
    assert "skipped: ranks: needs two [GPUs], one is here" in shown
    assert " ok " not in shown


def test_the_command_skips_by_name_and_exits_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the command sets it: so that it is taken back
    monkeypatch.setattr(ranks, "find_spec", lambda name: None)
    out = tmp_path / "skipped.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--dry-run", "--only", "ranks", "--out", str(out)])
    assert command.main() == 0
    [section] = json.loads(out.read_text())["sections"]
    assert (section["name"], section["status"], section["reason"]) == ("ranks", "skipped", "needs the package pyzmq")
    shown = capsys.readouterr().out
    assert "skipped: ranks: needs the package pyzmq" in shown
    assert " ok " not in shown


# ---- what is alike ----


def token(token_id: int, logprob: float, **others: float) -> TokenLogprob:
    """``others``: candidates beside it, by id."""
    top = {token_id: logprob, **{int(key[1:]): value for key, value in others.items()}}
    return TokenLogprob(token_id, logprob, tuple(TopLogprob(*each) for each in top.items()))


def answer(*tokens: TokenLogprob) -> Answer:
    return Answer(tuple(one.token_id for one in tokens), tokens)


CLEAR = answer(token(5, -0.1, t6=-2.0), token(7, -0.2, t8=-3.0))
OTHER = answer(token(5, -0.1, t6=-2.0), token(8, -0.2, t7=-3.0))
CLOSE = answer(token(5, -0.1, t6=-2.0), token(9, -0.5, t8=-0.5005))


def test_answers_that_hang_on_the_last_bits_are_left_out() -> None:
    answers = {"base-0": CLEAR, "base-1": CLOSE, "lora-0": OTHER, "lora-1": CLEAR}
    assert list(clear_ones(answers)) == ["base-0", "lora-0", "lora-1"]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"base-0": CLOSE, "base-1": CLOSE, "base-2": CLEAR}, "1 of 3 answers have clear tokens: less than half"),
        ({"base-0": CLEAR, "lora-0": CLEAR}, "adapter 'lora' changes no token"),
        ({"base-0": CLEAR, "lora-0": CLOSE}, "adapter 'lora' has no answer with clear tokens"),
    ],
)
def test_answers_that_tell_nothing_are_refused(answers: dict[str, Answer], message: str) -> None:
    with pytest.raises(NothingToCompare, match=message):
        clear_ones(answers)


def test_tokens_must_be_equal() -> None:
    assert compare_tokens({"base-0": CLEAR, "lora-0": OTHER}, {"lora-0": OTHER}) == []
    assert compare_tokens({"base-0": CLEAR}, {"base-0": OTHER}) == ["base-0 answers [5, 8], must be [5, 7]"]


def test_logprobs_are_compared_to_the_first_token_that_differs() -> None:
    one = answer(token(5, -0.1), token(7, -0.70, t8=-0.80), token(1, -0.1))
    other = answer(token(5, -0.15), token(8, -0.65, t7=-0.90), token(2, -9.0))
    found = compare_near({"a-0": one, "a-1": one}, {"a-0": other, "a-1": one})
    assert (found["answers"], found["equal_answers"], found["tokens_compared"]) == (2, 1, 5)
    assert found["largest_difference_nats"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "wrong",
    [
        token(5, -0.1 - 1.1 * NEAR_NATS, t6=-2.0),  # less sure
        token(6, -0.1, t5=-2.0),  # another token is the best one
        token(7, -0.1, t8=-0.2),  # and neither lists the other's
    ],
)
def test_logprobs_must_be_near(wrong: TokenLogprob) -> None:
    with pytest.raises(DifferentTokens, match=r"token 0 of a-0: its logprobs are .* nats apart, allowed are 0.25"):
        compare_near({"a-0": CLEAR}, {"a-0": answer(wrong)})


class ScriptedEngine:
    """Answers by request: ``wrong_at`` (ranks, requests in the batch) the last one otherwise than before."""

    def __init__(self, config: Config, wrong_at: tuple[int, int]) -> None:
        self._ranks = config.model.tensor_parallel_size
        self._wrong_at = wrong_at

    def load(self, name: str, source: Path) -> None:
        assert (source / "adapter_config.json").is_file()

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        found = [OTHER if request.adapters else CLEAR for request in requests]
        return [*found[:-1], answer(token(4, -0.1, t5=-4.0))] if (self._ranks, len(found)) == self._wrong_at else found

    def step_s(self, adapters: Sequence[str], steps: Steps) -> float:
        return 0.001 * len(adapters) / self._ranks * (2 if adapters[0] else 1)


def scripted(wrong_at: tuple[int, int]) -> Callable[[Setting, Config], object]:
    @contextmanager
    def start(_setting: Setting, config: Config) -> Iterator[ScriptedEngine]:
        yield ScriptedEngine(config, wrong_at)

    return start


@pytest.mark.parametrize(
    ("wrong_at", "error", "rows"),
    [
        ((2, 9), "2 ranks, graphs off, adapters of tables: ia3-2 answers [4], must be [5, 8]", 1),
        ((2, 12), "2 ranks, graphs off, with own rows: tokens-2 answers [4], must be [5, 8]", 2),
    ],
)
def test_other_tokens_fail_the_section_and_are_counted(
    wrong_at: tuple[int, int], error: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "served", scripted(wrong_at))
    outcome = run_section(ranks.SECTION, setting(), lambda _: None)
    assert (outcome.status, outcome.error) == ("failed", f"DifferentTokens: {error}")
    assert [row["wrong_requests"] for row in outcome.rows] == [0] * (rows - 1) + [1]


def test_speed_is_set_against_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "served", scripted((0, 0)))
    monkeypatch.setattr(ranks, "time_sums", lambda *_: iter(()))
    outcome = run_section(ranks.SECTION, setting(), lambda _: None)
    cells = [row for row in outcome.rows if "retention" in row]
    assert [(row["ranks"], row["batch"], row["times_one_rank"]) for row in cells] == [
        (1, 1, 1.0),
        (1, 3, 1.0),
        (2, 1, 2.0),
        (2, 3, 2.0),
    ]
    assert {row["retention"] for row in cells} == {0.5}
    assert [row["tokens_per_s"] for row in cells] == pytest.approx([500, 500, 1000, 1000])


# ---- that it ends ----


def children() -> list[str]:
    return [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]


@pytest.mark.parametrize(
    ("left_s", "start_s", "raised", "message"),
    [
        (100.0, 1.0, Hung, r"the start of 2 rank\(s\), graphs off: not done in 1 s"),
        (0.5, 100.0, OutOfTime, "in the start of 2"),
    ],
)
def test_a_start_that_does_not_end_is_ended(
    tmp_path: Path,
    left_s: float,
    start_s: float,
    raised: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(served, "START_S", start_s)  # it takes some seconds to import torch
    where = setting(left_s=left_s)
    config = ranks._config(where, write_config(shape_of(True), tmp_path / "model"), "float32", 2, "off")
    with pytest.raises(raised, match=message), served.served(where, config):
        raise AssertionError("it had no time to start")
    deadline = time.monotonic() + 20
    while any("loraplex" in line for line in children()):
        assert time.monotonic() < deadline, children()
        time.sleep(0.05)


class Told:
    """A client that answers for ever, and reports steps as it is told."""

    def __init__(self, reports: Sequence[StepReport]) -> None:
        self._reports = reports
        self._told: Callable[[StepReport], None] = lambda _: None

    def on_report(self, told: Callable[[StepReport], None]) -> None:
        self._told = told

    async def generate(self, request: Request) -> AsyncIterator[TokenEvent]:
        for report in self._reports:
            self._told(report)
            await asyncio.sleep(0.001)
        await asyncio.Event().wait()
        yield TokenEvent(0)


def test_late_steps_of_the_batch_before_are_not_counted() -> None:
    late = [StepReport(step_s=9.0, decode_tokens=1)] * 5
    own = [StepReport(prefill_tokens=5), *(StepReport(step_s=s, decode_tokens=1) for s in (1.0, 2.0, 3.0))]
    with asyncio.Runner() as runner:
        engine = ServedEngine(cast(EngineClient, Told([*late, *own])), served._Bounds(setting(), runner))
        assert engine.step_s(("",), Steps(prompt_tokens=5, warm=1, timed=2)) == 2.5


def test_a_rank_without_an_answer_is_named() -> None:
    with pytest.raises(SumsFailed, match=r"rank [01] ended with exit code 1: .*Dimension size must be non-negative"):
        list(time_sums(setting(), -1, 64, (1,)))
    assert not [line for line in children() if "group_sums" in line]


def test_sums_that_are_late_are_ended() -> None:
    with pytest.raises(OutOfTime, match="in the sums over ranks"):
        list(time_sums(setting(left_s=0.2), 16, 64, (1,)))
    assert not [line for line in children() if "group_sums" in line]


def test_a_captured_sum_that_adds_nothing_is_found() -> None:
    check_captured(SoloGroup(), torch.device("cpu"))
    with pytest.raises(SumsFailed, match=r"a captured sum over 2 ranks gives \[1.0, .*\], must be 3.0"):
        check_captured(SoloGroup(size=2), torch.device("cpu"))  # its sums are what each rank brought


def test_the_section_leaves_time_to_those_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    @contextmanager
    def start(where: Setting, _config: Config) -> Iterator[ScriptedEngine]:
        seen.append(where.left_s())
        raise OutOfTime("enough seen")
        yield

    monkeypatch.setattr(ranks, "served", start)
    for left_s in (10_000.0, 50.0):
        section = Section("ranks", ranks.run, 0.0)
        assert run_section(section, setting(left_s=left_s), lambda _: None).status == "out of time"
    assert seen[0] == pytest.approx(ranks.LIMIT_S, abs=20)
    assert seen[1] == pytest.approx(50, abs=20)
