"""Whole loads against servers: what is written, what agrees with the metrics, what happens when they end badly."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from bench.serve.__main__ import main
from bench.serve.document import SCHEMA_FILE, Document, schema_text
from bench.serve.plots import NAMES
from bench.serve.report import render
from loraplex.errors import RequestCancelled
from loraplex.metrics import Metrics, MetricsServer
from loraplex.types import Request
from loraplex_client import Client
from tests.fakes import FakeEngine
from tests.rpc.serving import serving_thread
from tests.servers import environment, serve, tiny_base, until

STEP_S = 0.01
PNG = b"\x89PNG\r\n"
#: small requests, few of them
SMALL = "--prompt-tokens 3-9 --output-tokens 2-5 --num-requests 8 --arrival closed:4 --warmup 0"


@dataclass(frozen=True)
class Target:
    """A server over a fake engine, with adapters a and b."""

    engine: FakeEngine
    address: str
    metrics: Metrics


@contextmanager
def target(step_s: float = STEP_S) -> Iterator[Target]:
    engine = FakeEngine()
    with serving_thread(engine) as served:
        with Client(served.app.address) as client:
            client.load_adapter("a", "/a")
            client.load_adapter("b", "/b")
        engine.step_s = step_s
        yield Target(engine, served.app.address, served.metrics)


def load(server: str, out: Path, line: str = "") -> int:
    """The harness in this process: small requests unless ``line`` says otherwise; the exit code."""
    return main(["--server", server, "--out", str(out), *SMALL.split(), *line.split()])


def document(out: Path) -> Document:
    return msgspec.json.decode((out / "load.json").read_bytes(), type=Document)


class References(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_a_load_with_baseline_leaves_numbers_pictures_and_a_page(tmp_path: Path) -> None:
    with target() as server:
        line = "--adapters a,b --popularity distinct --baseline base --repeats 2 --slo ttft=5,tpot=5 --warmup 3"
        assert load(server.address, tmp_path, line) == 0
        asked = list(server.engine.requests)
    got = document(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("load.json", "report.html"),
        *("throughput.png", "latency.png", "adapters.png", "requests.png"),
    }
    assert all(path.read_bytes().startswith(PNG) for path in tmp_path.glob("*.png"))
    assert (got.partial, got.requests_planned, got.requests_ended, got.stopped) == (False, 32, 32, "")
    assert [(run.repeat, run.side) for run in got.runs] == [(1, "base"), (1, "adapters"), (2, "adapters"), (2, "base")]
    # warm-up was sent and not counted; every request asked for exactly the tokens it got
    assert len(asked) == 3 + 32
    both = [got.sides["adapters"].all, got.sides["base"].all]
    assert [(side.sent, side.completed, side.failed, side.short) for side in both] == [(16, 16, 0, 0)] * 2
    assert sum(side.output_tokens for side in both) == sum(request.stop.max_tokens for request in asked[3:])
    assert {name: group.sent for name, group in got.sides["adapters"].adapters.items()} == {"a": 8, "b": 8}
    assert set(got.sides["base"].adapters) == {"base"}
    assert [len(request.adapters) for request in asked].count(1) == 2 + 16
    assert both[0].goodput is not None
    assert both[0].goodput.share == 1.0
    assert got.retention is not None
    assert len(got.retention.ratios) == 2
    assert 0.3 < got.retention.median < 3
    assert sum(got.runs[0].timeline.tokens) == got.runs[0].summary.output_tokens
    assert got.command[:3] == ["python", "-m", "bench.serve"]
    assert str(tmp_path) not in (tmp_path / "load.json").read_text()
    # decoded and encoded again it is the same: nothing in the file is outside the schema
    assert msgspec.json.encode(got) + b"\n" == (tmp_path / "load.json").read_bytes()


def test_the_page_holds_everything_itself_and_escapes_names(tmp_path: Path) -> None:
    with target() as server:
        assert load(server.address, tmp_path, "--adapters a,b") == 0
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path) not in page
    references = References()
    references.feed(page)
    assert len(references.found) == 4
    assert all(found.startswith("data:image/png;base64,") for found in references.found)
    assert not references.tags & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?://|url\(|@import", page)
    got = document(tmp_path)
    evil = "<script>alert(1)</script>"
    server_facts = msgspec.structs.replace(got.server, model=evil, address=evil)
    changed = msgspec.structs.replace(got, server=server_facts, warnings=[evil], command=[evil])
    shown = render(changed, []).decode()
    assert evil not in shown
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5


def test_client_and_server_count_alike(tmp_path: Path) -> None:
    # Steps so long that the way to the server and back, about 2 ms, is little beside them.
    with target(step_s=0.12) as server, closing(MetricsServer(server.metrics, "127.0.0.1", 0)) as exposed:
        line = "--adapters a,b --baseline base --repeats 1 --arrival closed:8"
        assert load(server.address, tmp_path, f"{line} --metrics http://127.0.0.1:{exposed.port}/metrics") == 0
    comparison = document(tmp_path).comparison
    assert comparison is not None
    assert {value.adapter for value in comparison.values} == {"a", "b", "base", "all"}
    counts = [value for value in comparison.values if value.unit != "s"]
    assert len(counts) == 4 * 4
    assert all(value.client == value.server > 0 for value in counts), counts
    for value in comparison.values:
        if value.unit == "s":
            # generous, for a busy machine
            assert value.server > 0.05
            assert -0.02 < value.difference < 0.25, value


def test_an_open_loop_is_never_held_back_by_slow_answers(tmp_path: Path) -> None:
    with target(step_s=0.2) as server:
        assert load(server.address, tmp_path, "--adapters a --arrival poisson:80 --output-tokens 3") == 0
    (run,) = document(tmp_path).runs
    assert run.send_lag_s is not None
    assert max(record.sent_s for record in run.requests) < 0.5 < min(record.ended_s for record in run.requests)
    assert all(record.due_s is not None and record.sent_s >= record.due_s for record in run.requests)


def test_failed_requests_are_told_and_flatter_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with target() as server:
        server.engine.fail_after = (6, RuntimeError("a bug"))
        assert load(server.address, tmp_path, "--adapters a --slo ttft=9") == 1
        got = document(tmp_path)
        server.engine.fail_after = None
        server.engine.answer = lambda request: [0] if len(request.prompt_token_ids) == 9 else range(1, 100)
        assert load(server.address, tmp_path / "short", "--adapters a --prompt-tokens 8-9 --slo ttft=9") == 0
    side = got.sides["adapters"].all
    assert side.completed < side.sent == 8
    assert side.errors == {"INTERNAL": side.failed}
    assert side.goodput is not None
    assert side.goodput.good <= side.completed
    assert any("failed (INTERNAL)" in warning for warning in got.warnings)
    assert "failed (INTERNAL)" in capsys.readouterr().out


def test_requests_that_the_base_answered_for_an_adapter_are_told(tmp_path: Path) -> None:
    with target() as server:
        server.engine.dress = lambda info: msgspec.structs.replace(info, invocation_tokens=(299, 298, 297, 296))
        with Client(server.address) as client:
            client.load_adapter("act", "/act")
        assert load(server.address, tmp_path, "--adapters a,act --popularity uniform") == 0
    (warning,) = [warning for warning in document(tmp_path).warnings if "not invoked" in warning]
    sent = sum(request.adapter == "act" for run in document(tmp_path).runs for request in run.requests)
    assert warning.startswith(f"adapter act was not invoked by {sent} of its requests")


def test_requests_that_the_server_cancels_are_failures_and_the_load_goes_on(tmp_path: Path) -> None:
    with target() as server:
        server.engine.fail_after = (3, RequestCancelled("its adapter was unloaded"))
        assert load(server.address, tmp_path, "--adapters a --num-requests 20") == 1
    got = document(tmp_path)
    assert not got.partial
    assert got.sides["adapters"].all.errors == {"CANCELLED": 20}


def test_a_timeout_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "latency.png").write_bytes(PNG)
    with target(step_s=1.0) as server:
        assert load(server.address, tmp_path, "--adapters a --timeout 100ms --num-requests 4") == 1
    # nothing was answered, so there is nothing to draw, and no picture of another load may lie there
    assert {path.name for path in tmp_path.iterdir()} == {"load.json", "report.html"}
    assert document(tmp_path).sides["adapters"].all.errors == {"DEADLINE_EXCEEDED": 4}


def test_a_dead_engine_ends_the_load_early(tmp_path: Path) -> None:
    with target() as server:
        engine = server.engine

        def answer(request: Request) -> range:
            if len(engine.requests) == 12:
                engine.die("killed")
            return range(1, 100)

        engine.answer = answer
        assert load(server.address, tmp_path, "--adapters a --num-requests 400") == 1
    got = document(tmp_path)
    assert (got.partial, got.stopped) == (True, "lost")
    assert "was lost: its health is NOT_SERVING" in got.stop_message
    assert got.sides["adapters"].all.completed > 0
    assert got.requests_ended < 30, "the rest of the schedule was burnt on a dead server"
    assert "Partial:" in (tmp_path / "report.html").read_text()


def test_a_bound_in_time_is_kept(tmp_path: Path) -> None:
    with target(step_s=0.02) as server, closing(MetricsServer(server.metrics, "127.0.0.1", 0)) as exposed:
        line = f"--adapters a --num-requests 400 --max-seconds 1 --metrics http://127.0.0.1:{exposed.port}/metrics"
        assert load(server.address, tmp_path, line) == 0
    got = document(tmp_path)
    assert (got.partial, got.stopped) == (True, "time")
    side = got.sides["adapters"].all
    assert side.cut_off == 4
    assert any("4 of" in warning and "cut off" in warning for warning in got.warnings)
    # what was cut off here ended there too, as soon as the server had heard of it
    assert got.comparison is not None
    (ended,) = [value for value in got.comparison.values if (value.adapter, value.measure) == ("all", "ended")]
    assert ended.client == ended.server == side.sent


@pytest.mark.parametrize(
    ("line", "code", "parts"),
    [
        ("--adapters a,nobody", 2, ("--adapters: nobody: not ready", "ready there: a, b")),
        ("--adapters a --prompt-tokens 250 --output-tokens 7", 2, ("--prompt-tokens 250", "up to 257", "up to 256")),
        ("--adapters a --metrics http://127.0.0.1:9/metrics", 1, ("--metrics http://127.0.0.1:9", "cannot be read")),
    ],
)
def test_what_the_server_cannot_do_is_refused_before_the_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, code: int, parts: tuple[str, ...]
) -> None:
    with target() as server:
        assert load(server.address, tmp_path, line) == code
        assert server.engine.requests == []
    said = capsys.readouterr().err
    assert all(part in said for part in parts), said
    assert list(tmp_path.iterdir()) == []


def test_no_server_and_no_place_are_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("127.0.0.1:9", tmp_path) == 1
    assert capsys.readouterr().err.startswith("bench.serve: --server 127.0.0.1:9: UNAVAILABLE: ")
    (tmp_path / "file").touch()
    assert load("127.0.0.1:9", tmp_path / "file" / "below") == 2
    said = capsys.readouterr().err
    assert "cannot be written" in said
    assert said.count("\n") == 1


def test_a_schema_is_checked_in_and_fresh() -> None:
    assert SCHEMA_FILE.read_text() == schema_text(), "run `python -m bench.serve.document`"


@pytest.mark.parametrize("folder", ["closed", "open"])
def test_the_loads_in_the_docs_are_whole_and_of_this_schema(folder: str) -> None:
    files = Path(__file__).parents[2] / "docs" / "serve" / folder
    got = document(files)
    assert not got.partial
    assert got.comparison is not None
    assert got.comparison.all_ok
    assert {path.stem for path in files.glob("*.png")} == set(NAMES)
    assert (files / "report.html").stat().st_size < 1_000_000


def harness(server: str, out: Path, line: str) -> subprocess.Popen[str]:
    words = f"--server {server} --out {out} --prompt-tokens 3 --warmup 0 --arrival closed:2 {line}".split()
    return subprocess.Popen(
        [sys.executable, "-m", "bench.serve", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )


def test_ctrl_c_writes_what_there_is(tmp_path: Path) -> None:
    with target(step_s=0.02) as server:
        process = harness(server.address, tmp_path, "--adapters a --num-requests 9000 --output-tokens 4")
        until(lambda: len(server.engine.requests) > 20, timeout_s=30)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
        assert process.returncode == 130, said
        until(lambda: not server.engine.running)
    got = document(tmp_path)
    assert (got.partial, got.stopped, got.requests_planned) == (True, "interrupted", 9000)
    assert 5 < got.requests_ended < 9000
    assert f"partial: {got.requests_ended} of 9000 requests: interrupted by SIGINT" in said
    assert "Traceback" not in said


def test_a_real_server_that_is_killed_in_the_middle(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "model")
    with serve(base, tmp_path / "log") as server:
        process = harness(server.address, tmp_path / "out", "--num-requests 9000 --output-tokens 40")
        until(lambda: server.value("loraplex_requests_total", adapter="base", code="OK") > 3, timeout_s=30)
        server.process.kill()
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 1, said
    got = document(tmp_path / "out")
    assert (got.partial, got.stopped) == (True, "lost")
    assert got.sides["base"].all.completed >= 4
    assert set(got.sides["base"].all.errors) == {"UNAVAILABLE"}
    assert "Traceback" not in said


def test_the_client_process_never_imports_torch() -> None:
    code = "import sys, bench.serve.__main__; sys.exit(', '.join({'torch', 'transformers'} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert os.sep not in done.stderr
