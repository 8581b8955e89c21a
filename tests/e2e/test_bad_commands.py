"""A server that cannot start: one line that says why, and exit code 2 for a wrong command line, 1 for all else."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from tests.servers import command, environment, tiny_base


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, env=environment())


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("--nonsense",), 2, "--nonsense"),
        (("--kv-cache-memory", "2 bananas"), 2, "'2 bananas' is not a size; write a number and a unit"),
        (("--model", "{root}"), 1, "has no config.json"),
        (("--port", "{taken}"), 1, "port: cannot listen on 127.0.0.1:{taken}: Address already in use"),
        (("--metrics-port", "{taken}"), 1, "metrics port: cannot listen on 127.0.0.1:{taken}: Address already in use"),
        (("--adapter", "a={root}/none"), 1, "'{root}/none' does not exist"),
        (("--kv-cache-memory", "1KiB"), 1, "kv_cache_memory 1024 bytes holds 0 pages"),
        (
            ("--max-num-seqs", "65", "--max-num-batched-tokens", "64"),
            1,
            "max_num_batched_tokens 64 is less than max_num_seqs 65",
        ),
        (("--adapter-dir", "{root}/none"), 1, "'{root}/none' is not a directory (--adapter-dir)"),
        (
            ("--tensor-parallel-size", "3"),
            1,
            "tensor_parallel_size 3 does not divide num_attention_heads = 4, num_key_value_heads = 2; sizes that fit "
            "are 1, 2, 4",
        ),
    ],
)
def test_serve_that_cannot_start_says_why_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], code: int, part: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = {"root": str(tmp_path), "taken": str(taken.getsockname()[1])}
        given = [argument.format(**words) for argument in arguments]
        free = ["--model", str(tiny_base(tmp_path)), "--port", "0", "--metrics-port", "0", "--threads", "1"]
        done = run("serve", *free, *given)
    assert done.returncode == code, done.stderr
    last = done.stderr.splitlines()[-1]
    assert part.format(**words) in last
    assert "Traceback" not in done.stderr
    if code == 1:
        assert last.startswith("loraplex: ")
