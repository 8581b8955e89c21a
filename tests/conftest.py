"""What every test run is held to: few threads, no network, no hub, and nothing left running at the end."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.interpreter import without_idle_work

# Read by libraries at their first import and inherited by the servers that tests start.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)
# Where it is set, each server that a test starts compiles all files of ours again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Not the user's own cache; kept between runs, because it holds the converted demo model.
os.environ.setdefault("LORAPLEX_CACHE", str(Path(__file__).parent.parent / ".pytest_cache" / "loraplex"))

import torch  # here, because it reads OMP_NUM_THREADS

# Triton decides when a kernel is made whether it is compiled or interpreted: before anything imports one.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    without_idle_work()

# A shell ignores it for what it starts beside itself, and so would commands and servers, which tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: files of more than 12 s, the longest first: or one worker is still at one when the other has nothing left
LONG_FILES = (
    "e2e/test_machines.py",
    "bench/test_gpu_check.py",
    "quant/test_every_format.py",
    "engine/test_ranks_demo.py",
    "e2e/test_recovery.py",
    "ops/test_triton_compiles.py",
    "e2e/test_demo_flagship.py",
    "ops/test_ssd_op.py",
    "e2e/test_bad_commands.py",
    "ops/test_quant_compiles.py",
    "e2e/test_gguf_serving.py",
    "ops/test_quant_contract.py",
    "ops/test_attention_compiles.py",
    "engine/test_ranks_kinds.py",
    "engine/test_engine_properties.py",
    "ops/test_lora_op.py",
    "e2e/test_restart.py",
    "e2e/test_soak.py",
    "engine/test_flagship_triton.py",
    "ops/test_state_compiles.py",
)

#: processes that Python's multiprocessing keeps for its own use
KEPT_BY_PYTHON = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Without Python's collector of cycles, which from then on looks at what tests make, not at all that stands here:
    two million objects that are there to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first (with ``--no-loadscope-reorder``; else xdist begins with files of many tests)."""
    places = {item.path: _place(item.path) for item in items}
    items.sort(key=lambda item: places[item.path])


def _place(path: Path) -> int:
    """Among the long files; behind them, where it is none."""
    return next((at for at, long in enumerate(LONG_FILES) if path.as_posix().endswith(long)), len(LONG_FILES))


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Python sockets reach this machine only."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        if self.family in (socket.AF_INET, socket.AF_INET6) and host not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address!r}; tests run without a network")
        connect(self, address)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


@pytest.fixture(scope="session")
def kinds_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the matrices of kinds (``tests/kind_matrix.py``) are made in, once for all workers of a run."""
    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "kinds"
    root.mkdir(exist_ok=True)
    return root


@pytest.fixture(scope="session", autouse=True)
def nothing_left_running() -> Iterator[None]:
    """After the last test and every other session fixture: no process and no blocking thread is left."""
    before = {process.pid for process in psutil.Process().children()}
    yield
    left = [p for p in psutil.Process().children() if p.pid not in before and not _kept_by_python(p)]
    _, alive = psutil.wait_procs(left, timeout=3)
    processes = [_command(process) for process in alive]
    threads = [t.name for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
    threads = [name for name in threads if not name.startswith("execnet")]
    assert not processes, f"tests left processes running: {processes}"
    assert not threads, f"tests left threads running: {threads}"


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended just now
        return ""


def _kept_by_python(process: psutil.Process) -> bool:
    command = _command(process)
    return not command or any(kept in command for kept in KEPT_BY_PYTHON)  # a zombie has no command
