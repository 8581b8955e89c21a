"""Starts the processes of the other ranks on this machine, and watches them. No torch here: theirs comes meanwhile."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Final

import msgspec

#: how long an ordered end may take before a process is killed
_STOP_S: Final = 5.0


class RankProcess:
    """A rank's process, which ends with the pipe to it."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """``environment``: None is this process's own."""
        command = [sys.executable, "-m", "loraplex.engine.ranks.process"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, start: msgspec.Struct) -> RankProcess:
        """Itself, told what it is to be; once. One that has ended is not told: ``ended`` says so."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(msgspec.json.encode(start) + b"\n")
            self._process.stdin.flush()
        return self

    def ended(self) -> str:
        """Why it is no more; empty while it is."""
        code = self._process.poll()
        return "" if code is None else f"its process ended with exit code {code}"

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Wait for an end that was ordered, or make it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()


def start_processes(number: int, environment: Mapping[str, str] | None = None) -> list[RankProcess]:
    """So many, which wait for ``begin``."""
    return [RankProcess(environment) for _ in range(number)]
