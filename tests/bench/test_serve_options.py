"""The harness's command line: what it reads, and one line for what cannot be, naming option, value and allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.serve.options import parse
from bench.serve.workload import Arrival, Lengths, Popularity, Slo


def test_everything_is_read() -> None:
    line = (
        "--server h:1 --adapters a,b,c --popularity skewed:1.2 --arrival gamma:4:2.5 --prompt-tokens 16-32 "
        "--output-tokens 8 --num-requests 40 --seed 7 --baseline base --slo ttft=500ms,tpot=0.05,e2e=2s "
        "--metrics http://h:2/metrics --timeout 9 --max-seconds 60 --out x"
    )
    options = parse(line.split())
    work = options.workload
    assert (options.server, options.metrics, options.timeout_s, options.max_seconds) == (
        "h:1",
        "http://h:2/metrics",
        9,
        60,
    )
    assert options.out == Path("x")
    assert work.adapters == ("a", "b", "c")
    assert work.popularity == Popularity("skewed", 1.2)
    assert work.arrival == Arrival("gamma", rate=4, cv=2.5)
    assert (work.prompt_tokens, work.output_tokens) == (Lengths(16, 32), Lengths(8, 8))
    assert (work.num_requests, work.seed, work.repeats, work.warmup) == (40, 7, 3, 8)
    assert options.slo == Slo(0.5, 0.05, 2)
    assert work.sides == ("base", "adapters")


def test_without_adapters_it_is_the_base_model_alone() -> None:
    assert parse(["--out", "x"]).workload.sides == ("base",)
    assert parse(["--out", "x", "--adapters", "a"]).workload.sides == ("adapters",)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--popularity popular", ("--popularity", "'popular'", "skewed:ALPHA")),
        ("--popularity skewed:-1", ("--popularity", "'skewed:-1'", "above 0")),
        ("--popularity uniform:2", ("'uniform:2'",)),
        ("--arrival poisson:0", ("--arrival", "'poisson:0'", "poisson:RATE")),
        ("--arrival poisson", ("'poisson'", "gamma:RATE:CV")),
        ("--arrival gamma:4", ("'gamma:4'",)),
        ("--arrival poisson:nan", ("'poisson:nan'",)),
        ("--arrival closed:2.5", ("'closed:2.5'", "closed:CONCURRENCY")),
        ("--arrival closed:65", ("--arrival closed:65", "--num-requests 64")),
        ("--prompt-tokens 0", ("--prompt-tokens", "'0'", "from 1")),
        ("--output-tokens 9-3", ("--output-tokens", "'9-3'", "LO-HI")),
        ("--num-requests 0", ("--num-requests", "'0'", "from 1")),
        ("--seed -1", ("--seed",)),
        ("--baseline peft", ("--baseline", "'peft'", "none")),
        ("--baseline base", ("--baseline base", "--adapters")),
        ("--adapters a,,b", ("--adapters", "'a,,b'", "empty")),
        ("--adapters a,b,a", ("'a,b,a'", "more than once")),
        ("--slo ttft", ("--slo", "'ttft'", "ttft, tpot and e2e")),
        ("--slo ttft=", ("'ttft='",)),
        ("--slo ttft=1,ttft=2", ("'ttft=2'",)),
        ("--slo speed=3", ("'speed=3'",)),
        ("--slo tpot=0", ("'tpot=0'",)),
        ("--metrics ftp://h/x", ("--metrics", "'ftp://h/x'", "http://HOST:PORT/metrics")),
        ("--timeout 0", ("--timeout", "'0'", "above 0")),
        ("--repeats 0", ("--repeats", "'0'")),
    ],
)
def test_what_cannot_be_is_refused(line: str, parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse([*line.split(), "--out", "x"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert all(part in said for part in parts), said


def test_a_place_for_the_files_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse([])
    assert ended.value.code == 2
    assert "--out" in capsys.readouterr().err
