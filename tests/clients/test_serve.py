"""``loraplex serve`` as a process of its own, with the real engine on a tiny model: ready, drain, hasty ends."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from loraplex_client import Client, Params
from tests.servers import running
from tests.small_lora import write_adapter
from tests.tiny import tiny_checkpoint


@dataclass(frozen=True)
class Serving:
    process: subprocess.Popen[bytes]
    address: str
    output: str


@contextlib.contextmanager
def starting(tmp_path: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that has just been started; what it says goes to ``tmp_path / "log"``."""
    base = tiny_checkpoint(tmp_path, "llama")
    adapter = write_adapter(tmp_path / "fr", base, rank=4)
    argv = ["serve", "--model", str(base), "--adapter", f"fr={adapter}", "--port", "0", "--metrics-port", "0"]
    with running(tmp_path / "log", *argv, "--threads", "1", *flags) as process:
        yield process


@contextlib.contextmanager
def serve(tmp_path: Path, *flags: str) -> Iterator[Serving]:
    """One that is ready."""
    log = tmp_path / "log"
    with starting(tmp_path, *flags) as process:
        deadline = time.monotonic() + 60.0
        while (ready := re.search(r"ready on (\S+)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield Serving(process, ready[1], log.read_text())


def test_ready_generate_drain(tmp_path: Path) -> None:
    with serve(tmp_path) as server, Client(server.address) as client:
        for part in ("LlamaForCausalLM", "adapters  fr (lora)", "metrics   http://127.0.0.1:"):
            assert part in server.output
        params = Params(max_tokens=200, ignore_eos=True, token_ids=True)
        alone = client.generate([5, 6, 7], params, adapters="fr")
        stream = client.stream([5, 6, 7], params, adapters="fr")
        first = next(stream)
        server.process.send_signal(signal.SIGINT)
        rest = list(stream)
        assert tuple(i for part in (first, *rest) for i in part.token_ids) == alone.token_ids
        assert rest[-1].finish_reason == "length"
        assert server.process.wait(15) == 0


def test_a_hasty_second_signal_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with serve(tmp_path) as server:
        children = psutil.Process(server.process.pid).children()
        (directory,) = (tmp_path / "tmp").glob("loraplex-*")
        while server.process.poll() is None and directory.exists():  # at every moment of the end
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        assert server.process.wait(15) == 0
        assert not list((tmp_path / "tmp").glob("loraplex-*"))
        assert not any(child.is_running() for child in children)


def test_a_start_that_is_terminated_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with starting(tmp_path) as process:
        while not (children := psutil.Process(process.pid).children()):
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        assert process.wait(15) == 128 + signal.SIGTERM
        assert not list((tmp_path / "tmp").glob("loraplex-*"))
        assert not any(child.is_running() for child in children)
        assert "Traceback" not in (tmp_path / "log").read_text()
