"""A real server as a child process, on free ports, for the demo and the benchmarks: start, wait until ready, end."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from loraplex.errors import Unavailable
from loraplex_client import health

HOST: Final = "127.0.0.1"
_POLL_S: Final = 0.05
_STOP_S: Final = 15.0
_LOG_LINES: Final = 15


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server that is ready."""

    address: str  # 127.0.0.1:PORT
    metrics_url: str
    pid: int
    #: from the command to the first SERVING
    start_s: float


@contextlib.contextmanager
def running_server(arguments: Sequence[str], *, log: Path, timeout_s: float = 120.0) -> Iterator[ServerProcess]:
    """Run ``loraplex serve`` with ``arguments`` and two free ports while the block lasts; it writes to ``log``.

    Raises Unavailable with the end of the log when the server ends, or is not ready within ``timeout_s`` seconds.
    """
    port, metrics_port = _free_ports(2)
    address = f"{HOST}:{port}"
    ports = ["--host", HOST, "--port", str(port), "--metrics-port", str(metrics_port)]
    start = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "loraplex.cli", "serve", *arguments, *ports],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        while not _serving(address, port):
            if process.poll() is not None:
                raise Unavailable(f"the server ended with exit code {process.returncode}:\n{_end_of(log)}")
            if time.monotonic() - start > timeout_s:
                raise Unavailable(f"the server was not ready within {timeout_s:.0f} s:\n{_end_of(log)}")
            time.sleep(_POLL_S)
        url = f"http://{HOST}:{metrics_port}/metrics"
        yield ServerProcess(address, url, process.pid, time.monotonic() - start)
    finally:
        _end(process)


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _serving(address: str, port: int) -> bool:
    # A plain connect first: a refused gRPC channel backs off for a second before it tries again.
    try:
        socket.create_connection((HOST, port), timeout=1.0).close()
        return health.check(address) == "SERVING"
    except (OSError, grpc.RpcError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
