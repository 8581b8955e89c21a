"""What a session becomes in the report: retention, warnings, and pages of loads that measured little or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.serve.document import Document
from bench.serve.load import Outcome, Played, Stop
from bench.serve.options import Options, parse
from bench.serve.plots import draw
from bench.serve.record import make_document
from bench.serve.report import render
from bench.serve.schedule import Planned
from bench.serve.session import Measured, Session, runs_in_turn
from bench.serve.workload import Side
from loraplex_client import Adapter, Limits, Model

MODEL = Model(
    id="/home/somebody/models/tiny",
    architecture="llama",
    dtype="float32",
    device="cpu",
    quantization="none",
    tensor_parallel_size=1,
    vocab_size=300,
    max_model_len=256,
    eos_token_ids=(0,),
    sites=("q_proj",),
    backends={"lora": "cpu"},
    limits=Limits(8, 64, 16, 64, 1 << 20, 1 << 20, 4, 20, 8, 0, 0),
    server_version="0.1.0",
    weight_bytes=1 << 10,
)
A = Adapter(
    name="a",
    uid="uid-a",
    kind="lora",
    state="ready",
    source="/home/somebody/adapters/a",
    max_rank=8,
    num_parameters=128,
    bytes=512,
    sites={},
    ranks={},
    residency="device",
    pinned=False,
    in_flight=0,
    loaded_at=None,
    last_used_at=None,
    error="",
    generation=1,
    changes={},
    probe=None,
    invocation_tokens=(),
    invocation_text="",
    tokenizer=None,
    profile=None,
)
REQUESTS = 4
WORDS = f"--adapters a --baseline base --num-requests {REQUESTS} --arrival closed:2 --output-tokens 10 --out x"


def options(more: str = "") -> Options:
    return parse([*WORDS.split(), *more.split()])


def run(side: Side, repeat: int, duration_s: float, **changed: float | str | None) -> Measured:
    """Four requests of 10 tokens that took ``duration_s`` in all; ``changed`` in the last of them."""
    adapter = "a" if side == "adapters" else ""
    outcomes = [one(index, adapter, duration_s) for index in range(REQUESTS)]
    last = outcomes[-1]
    last.code = str(changed.get("code", last.code))
    last.cached_prompt_tokens = int(changed.get("cached") or 0)
    if "due_s" in changed:
        last.planned = Planned(3, float(changed["due_s"] or 0), adapter, range(5), 10)
    played = Played(tuple(outcomes), REQUESTS, duration_s, float(changed.get("cpu_s") or 0.0))
    return Measured(side, repeat, 10.0 * repeat, played, None)


def one(index: int, adapter: str, duration_s: float) -> Outcome:
    times = [duration_s * (0.2 + 0.08 * token) for token in range(10)]
    planned = Planned(index, None, adapter, range(5), 10)
    return Outcome(planned, 0.01, "OK", "", times, [1] * 10, duration_s)


def made(runs: Sequence[Measured], stop: Stop | None = None, more: str = "") -> Document:
    session = Session(MODEL, {"a": A}, list(runs), (), 1_700_000_000.0, 1_700_000_100.0)
    return make_document(session, options(more), stop, ["python", "-m", "bench.serve", "--out", "/home/somebody/out"])


def test_sides_take_turns_and_who_is_first_alternates() -> None:
    order = list(runs_in_turn(options().workload))
    assert order == [(1, "base"), (1, "adapters"), (2, "adapters"), (2, "base"), (3, "base"), (3, "adapters")]


def test_retention_is_the_median_of_the_repeats_ratios() -> None:
    runs = [run("base", 1, 1.0), run("adapters", 1, 2.0), run("base", 2, 8.0), run("adapters", 2, 10.0)]
    got = made([*runs, run("base", 3, 1.0), run("adapters", 3, 1.0)]).retention
    assert got is not None
    assert got.ratios == pytest.approx([0.5, 0.8, 1.0])
    assert (got.median, got.least, got.most) == pytest.approx((0.8, 0.5, 1.0))


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "UNFINISHED"])
def test_a_repeat_that_lost_requests_gives_no_retention(code: str) -> None:
    runs = [run("base", 1, 1.0), run("adapters", 1, 1.0, code=code), run("base", 2, 1.0), run("adapters", 2, 2.0)]
    got = made(runs).retention
    assert got is not None
    assert got.ratios == pytest.approx([0.5])
    assert made(runs[:2]).retention is None
    assert made(runs[:1]).retention is None


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"code": "RESOURCE_EXHAUSTED"}, "1 of 12 requests failed (RESOURCE_EXHAUSTED)"),
        ({"code": "UNFINISHED"}, "1 of 12 requests were cut off"),
        ({"cached": 5}, "8% of the prompt tokens in its prefix cache"),
        ({"due_s": -9.0}, "the sender itself was late"),
        ({"cpu_s": 0.9}, "the client used 90% of a core"),
    ],
)
def test_what_spoils_the_numbers_is_said(changed: dict[str, float | str | None], part: str) -> None:
    clean = [run("base", 1, 1.0), run("adapters", 1, 1.0)]
    assert made([*clean, run("adapters", 2, 1.0)]).warnings == []
    (warning,) = made([*clean, run("adapters", 2, 1.0, **changed)]).warnings
    assert part in warning


def test_runs_that_differ_are_said_to() -> None:
    warnings = made([run("base", 1, 1.0), run("base", 2, 2.0)]).warnings
    assert warnings == [
        "the runs of one side (base) differ: 20 to 40 output tok/s. Was the machine busy with something else?"
    ]


def test_nobodys_folders_are_told() -> None:
    document = made([run("base", 1, 1.0)])
    assert document.server.model == "tiny"
    assert document.command[-1] == "out"
    assert "somebody" not in render(document, []).decode()


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [Measured("adapters", 1, 0.0, Played((), REQUESTS, 0.0, 0.0), None)],
        [run("base", 1, 1.0)],
        [run("base", 1, 1.0), run("adapters", 1, 1.0, code="INTERNAL", due_s=0.0)],
    ],
    ids=["no run", "nothing sent", "one side", "an error"],
)
def test_any_load_makes_a_page(runs: list[Measured], tmp_path: Path) -> None:
    document = made(runs, Stop("interrupted", "interrupted by SIGINT"), "--slo ttft=1,tpot=1")
    assert document.partial
    assert (document.requests_planned, document.stopped) == (24, "interrupted")
    page = render(document, draw(document)).decode()
    assert f"Partial: {document.requests_ended} of 24 requests ended" in page
    assert "interrupted by SIGINT" in page
