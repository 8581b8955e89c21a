"""One group over several machines: the promise holds across them, machines that are lost come back, and what cannot be
is refused by name on every one."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import psutil
import pytest

from tests.far_client import Generation, Work, do
from tests.kind_matrix import KindMatrix
from tests.namespaces import Machine, machines
from tests.servers import Serving, command, environment, running, serve, until
from tests.tiny import tiny_checkpoint

#: what an operator is promised
WITHIN_S = 15.0
PORT = 29417


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("machines")


def far(server: Serving, at: Machine, work: Work) -> list[list[int]]:
    """What the server answers to a client on its own machine."""
    client = at.command(sys.executable, "-m", "tests.far_client", server.address)
    done = subprocess.run(
        client, input=msgspec.json.encode(work), capture_output=True, timeout=120, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return msgspec.json.decode(done.stdout, type=list[list[int]])


def work_of(matrix: KindMatrix, names: Sequence[str]) -> tuple[dict[str, str], list[Generation], list[list[int]]]:
    """The adapters to load, requests for each and for the base, and what PEFT answers."""
    cases = [case for name in ("", *names) for case in matrix.cases(name)]
    asked = [
        Generation(
            list(case.request.prompt_token_ids),
            {ref.name: ref.weight for ref in case.request.adapters},
            case.request.stop.max_tokens,
        )
        for case in cases
    ]
    load = {name: str(matrix.adapter(name)) for name in names}
    return load, asked, [list(case.expected) for case in cases]


@pytest.fixture
def interrupts_ignored() -> Iterator[None]:
    """By what is started meanwhile, until it says otherwise: so begins what a shell's script starts with ``&``."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts_ignored")
@pytest.mark.timeout(280)
def test_all_kinds_across_two_machines(root: Path, kinds_root: Path) -> None:
    matrix = KindMatrix(kinds_root, "llama", tied=False)
    load, asked, expected = work_of(matrix, matrix.names)
    flags = ["--tensor-parallel-size", "4", "--nnodes", "2", "--adapter-dir", str(kinds_root), "--threads", "1"]
    flags += ["--dtype", "float32", "--kv-cache-memory", "2MiB"]
    with machines(2) as (one, two):
        flags += ["--rdzv-endpoint", f"{one.address}:{PORT}", "--rdzv-timeout", "60"]
        # the model lies elsewhere there, and no adapter does
        (elsewhere := root / "elsewhere").symlink_to(matrix.base_dir)
        there = ["--model", str(elsewhere), "--node-rank", "1", *flags]
        with (
            running(root / "two.log", "serve", *there, at=two) as node,
            serve(matrix.base_dir, root / "one.log", *flags, at=one) as server,
        ):
            assert "ranks     4 on 2 machines" in server.log
            assert far(server, one, Work(load, asked)) == expected
            node.send_signal(signal.SIGINT)  # another machine takes its place
            assert node.wait(10) == 0
            with running(root / "new-two.log", "serve", *there, at=two) as new_node:
                assert far(server, one, Work({}, asked[:8], retry_s=2 * WITHIN_S)) == expected[:8]
                server.process.terminate()
                assert server.process.wait(15) == 0
                assert new_node.wait(15) == 0
            assert "node 1 of 2: the server has ended" in (root / "new-two.log").read_text()
    assert "Traceback" not in server.log + (root / "two.log").read_text() + (root / "new-two.log").read_text()


def refused(log_file: Path, process: subprocess.Popen[bytes], code: int = 1) -> str:
    """What a command said that ended with ``code``."""
    assert process.wait(60) == code, log_file.read_text()
    text = log_file.read_text()
    assert "Traceback" not in text
    return text


def shared(root: Path, *more: str) -> list[str]:
    """Flags of two machines that are both this one."""
    flags = ["--model", str(tiny_checkpoint(root, "llama")), "--threads", "1", "--dtype", "float32"]
    flags += ["--tensor-parallel-size", "2", "--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{PORT}"]
    return [*flags, "--kv-cache-memory", "2MiB", "--port", "0", "--metrics-port", "0", *more]


@pytest.mark.timeout(120)
def test_a_machine_with_other_settings_is_refused_on_both(root: Path) -> None:
    with (
        running(root / "first.log", "serve", *shared(root)) as first,
        running(root / "other.log", "serve", *shared(root, "--node-rank", "1", "--max-num-seqs", "7")) as other,
    ):
        texts = [refused(root / "first.log", first), refused(root / "other.log", other)]
    for text in texts:
        assert (
            "engine.max_num_seqs is 7 on node 1 and 64 on the first machine; all machines take the same flags but "
            "--node-rank" in text
        )


@pytest.mark.timeout(120)
def test_a_start_that_fails_ends_the_other_machines_with_the_reason(root: Path) -> None:
    """This one is found when all have loaded: the caches hold no page."""
    flags = shared(root, "--kv-cache-memory", "1kB")
    with (
        running(root / "first.log", "serve", *flags) as first,
        running(root / "other.log", "serve", *flags, "--node-rank", "1") as other,
    ):
        texts = [refused(root / "first.log", first), refused(root / "other.log", other)]
    assert all("kv_cache_memory 1000 bytes holds 0 pages" in text for text in texts)


@pytest.mark.timeout(120)
def test_a_machine_that_does_not_come_is_named(root: Path) -> None:
    with running(root / "first.log", "serve", *shared(root, "--rdzv-timeout", "1")) as first:
        text = refused(root / "first.log", first)
    assert (
        f"node 1 of 2 did not come to 127.0.0.1:{PORT} within 1 s; start the same command there with --node-rank 1"
        in text
    )
    with running(root / "other.log", "serve", *shared(root, "--rdzv-timeout", "1", "--node-rank", "1")) as other:
        text = refused(root / "other.log", other)
    assert f"node 1 of 2 was not called at 127.0.0.1:{PORT} within 1 s: no server starts there" in text


@pytest.mark.timeout(200)
def test_a_wire_that_is_cut_ends_the_group_and_one_that_is_mended_brings_it_back(root: Path) -> None:
    base = tiny_checkpoint(root, "llama")
    flags = ["--tensor-parallel-size", "2", "--nnodes", "2", "--threads", "1", "--dtype", "float32"]
    flags += ["--kv-cache-memory", "2MiB"]
    asked = Work({}, [Generation([1, 2, 3], {}, 8)], retry_s=60.0)
    with machines(2) as (one, two):
        flags += ["--rdzv-endpoint", f"{one.address}:{PORT}"]
        with (
            running(root / "two.log", "serve", "--model", str(base), "--node-rank", "1", *flags, at=two) as node,
            serve(base, root / "one.log", *flags, at=one) as server,
        ):
            expected = far(server, one, asked)
            two.run("ip", "link", "set", "wire", "down")
            until(lambda: "the connection to node 1 of 2 is lost" in server.log, timeout_s=WITHIN_S)
            until(lambda: "the group has ended" in (root / "two.log").read_text(), timeout_s=WITHIN_S)
            two.run("ip", "link", "set", "wire", "up")
            assert far(server, one, asked) == expected
            assert node.poll() is None
            server.process.terminate()
            assert server.process.wait(15) == 0
            assert node.wait(15) == 0


@pytest.mark.timeout(280)
def test_inside_torchrun_each_process_is_a_machine(root: Path, kinds_root: Path) -> None:
    """The store is torchrun's, and so are the numbers; every process has the same command line."""
    matrix = KindMatrix(kinds_root, "qwen3", tied=True)
    load, asked, expected = work_of(matrix, ("lora", "dora", "ia3", "alora", "lora-added-tokens"))
    flags = ["--model", str(matrix.base_dir), "--tensor-parallel-size", "2", "--threads", "1", "--dtype", "float32"]
    flags += ["--kv-cache-memory", "2MiB", "--port", "0", "--metrics-port", "0", "--adapter-dir", str(kinds_root)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    torchrun += ["--master-port", str(PORT + 1), "--no-python"]
    log_file = root / "torchrun.log"
    with log_file.open("wb") as sink:
        process = subprocess.Popen(
            [*torchrun, *command("serve", *flags)], stdout=sink, stderr=subprocess.STDOUT, env=environment()
        )
    try:
        until(lambda: "ready on" in log_file.read_text(), timeout_s=60)
        log = log_file.read_text()
        assert "node 1 of 2: taking part" in log
        address = log.partition("ready on ")[2].split()[0]
        assert asyncio.run(do(address, Work(load, asked))) == expected
        (rank,) = [
            found
            for found in psutil.Process(process.pid).children(recursive=True)
            if "ranks.process" in " ".join(found.cmdline())
        ]
        rank.kill()  # the next start meets in the same store
        until(lambda: "on node 1, its process ended with exit code -9" in log_file.read_text())
        until(lambda: "serves again" in log_file.read_text(), timeout_s=2 * WITHIN_S)
        assert asyncio.run(do(address, Work({}, asked[:8]))) == expected[:8]
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.timeout(60)
def test_a_start_that_waits_for_machines_ends_with_its_front_end(root: Path) -> None:
    with running(root / "first.log", "serve", *shared(root)) as first:
        until(lambda: "waiting for 1 more machines" in (root / "first.log").read_text(), timeout_s=30.0)
        (engine,) = psutil.Process(first.pid).children()
        first.kill()
        until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
    assert "Traceback" not in (root / "first.log").read_text()
