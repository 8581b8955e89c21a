"""Starts the processes of the other ranks on this machine, and watches them. No torch here: theirs comes meanwhile."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from loraplex.config import Config
from loraplex.parallel.shared_place import MOST_RANKS, SharedPlace, make_place

#: how long an ordered end may take before a process is killed
_STOP_S: Final = 5.0


class RankProcess:
    """A rank's process, which ends with the pipe to it."""

    def __init__(self, environment: Mapping[str, str] | None = None, files: Sequence[int] = ()) -> None:
        """``environment``: None is this process's own. ``files``: open ones that it inherits."""
        command = [sys.executable, "-m", "loraplex.engine.ranks.process"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, pass_fds=tuple(files))

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


@dataclass(frozen=True, slots=True)
class RanksHere:
    """The ranks on the first one's machine: ``processes`` are those besides itself, whose sockets lie beside
    ``address``, that of the engine. ``place``: memory that all have inherited, where there is no other machine and they
    are not too many."""

    address: str
    processes: tuple[RankProcess, ...]
    place: SharedPlace | None

    def kill(self) -> None:
        """End them at once."""
        for process in self.processes:
            process.kill()


def start_here(config: Config, address: str) -> RanksHere:
    """The ranks beside the first one, which wait for ``begin``."""
    ranks = config.ranks_here
    place = make_place(ranks) if 1 < ranks <= MOST_RANKS and config.nodes.nnodes == 1 else None
    files = place.files if place else ()
    return RanksHere(address, tuple(RankProcess(files=files) for _ in range(1, ranks)), place)
