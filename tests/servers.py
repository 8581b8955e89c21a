"""``loraplex serve`` as a child process over a tiny model that has a tokenizer, and what it says on /metrics."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from loraplex_client import health
from tests.namespaces import Machine
from tests.rpc.serving import TEMPLATE, backend
from tests.tiny import tiny_checkpoint

VOCAB_SIZE = 300
MAX_MODEL_LEN = 8192
START_S = 60.0


@dataclass(frozen=True)
class Serving:
    """A server that said it is ready."""

    process: subprocess.Popen[bytes]
    address: str
    metrics_url: str
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def metrics(self) -> dict[str, Metric]:
        """The families of a scrape, by name."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as response:
            text = response.read().decode()
        return {family.name: family for family in text_string_to_metric_families(text)}

    def value(self, name: str, **labels: str) -> float:
        """The one sample of the scrape with that name and those labels; 0 when it is not there (yet)."""
        found = [
            sample.value
            for family in self.metrics().values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert len(found) <= 1, (name, labels, found)
        return found[0] if found else 0.0


def tiny_base(root: Path) -> Path:
    """A tiny llama with a long context and a tokenizer with a chat template, made once below ``root``."""
    base = tiny_checkpoint(root, "llama", vocab_size=VOCAB_SIZE, max_position_embeddings=MAX_MODEL_LEN)
    backend().save(str(base / "tokenizer.json"))
    (base / "chat_template.jinja").write_text(TEMPLATE)
    return base


def command(*arguments: str) -> list[str]:
    """The command line of ``loraplex ARGUMENTS`` in the interpreter of the tests."""
    return [sys.executable, "-m", "loraplex.cli", *arguments]


def environment() -> dict[str, str]:
    """For ``command``: what the tests import from."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@contextlib.contextmanager
def running(log_file: Path, *arguments: str, at: Machine | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """``loraplex ARGUMENTS`` while the block lasts, which says what it has to say in ``log_file``; SIGKILL at its end,
    if it still runs. ``at``: on another machine."""
    line = command(*arguments)
    with log_file.open("wb") as sink:
        process = subprocess.Popen(
            at.command(*line) if at else line,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@contextlib.contextmanager
def serve(base: Path, log_file: Path, *arguments: str, at: Machine | None = None) -> Iterator[Serving]:
    """Serve ``base`` on free ports while the block lasts; SIGKILL at its end, if it still runs. ``at``: another
    machine."""
    flags = ["--port", "0", "--metrics-port", "0", "--threads", "1", "--dtype", "float32", "--kv-cache-memory", "8MiB"]
    with running(log_file, "serve", "--model", str(base), *flags, *arguments, at=at) as process:
        until(lambda: "ready on" in log_file.read_text() or process.poll() is not None, timeout_s=START_S)
        log = log_file.read_text()
        ready, metrics = re.search(r"ready on (\S+)", log), re.search(r"metrics +(\S+)", log)
        assert ready, log
        assert metrics, log
        yield Serving(process, ready[1], metrics[1], log_file)


def until(true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for something to come true."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.05)


def statuses(address: str) -> set[str]:
    """The health of the server and of each of its services."""
    services = ("", *(f"loraplex.v1.{name}Service" for name in ("Generation", "Adapter", "Model")))
    return {health.check(address, service=service) for service in services}
