"""Machines on this one: network namespaces of a user namespace, with a wire between each and the first. Linux.

They are not reachable from the tests' own network: what talks to a server in one runs there (``Machine.command``).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

_TOOLS = ("unshare", "nsenter", "ip")
_NET = "10.231.77"


@dataclass(frozen=True)
class Machine:
    """A network of its own, held by the process ``pid``."""

    pid: int
    address: str

    def command(self, *arguments: str) -> list[str]:
        """``arguments`` as a command on this machine."""
        return ["nsenter", "--preserve-credentials", "-t", str(self.pid), "-U", "-n", *arguments]

    def run(self, *arguments: str) -> None:
        """Run a short command there."""
        subprocess.run(self.command(*arguments), check=True, capture_output=True, timeout=20)


@contextlib.contextmanager
def machines(number: int) -> Iterator[list[Machine]]:
    """So many while the block lasts. Skips the test, by name, where the system gives none."""
    if missing := [tool for tool in _TOOLS if shutil.which(tool, path=_path()) is None]:
        pytest.skip(f"no network namespaces: {', '.join(missing)} missing")
    holders: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        holders.append(_hold(stack, ["unshare", "--user", "--map-root-user", "--net"]))
        first = Machine(holders[0].pid, f"{_NET}.1")
        for index in range(1, number):
            holders.append(_hold(stack, first.command("unshare", "--net")))
            machine = Machine(holders[index].pid, f"{_NET}.{index + 1}")
            first.run(
                "ip", "link", "add", f"wire{index}", "type", "veth", "peer", "name", "wire", "netns", str(machine.pid)
            )
        _wire(first, holders[1:])
        yield [Machine(holder.pid, f"{_NET}.{index + 1}") for index, holder in enumerate(holders)]


def _wire(first: Machine, others: list[subprocess.Popen[bytes]]) -> None:
    """All wires end in one bridge, so that every machine reaches every other."""
    first.run("ip", "link", "set", "lo", "up")
    first.run("ip", "link", "add", "wire", "type", "bridge")
    first.run("ip", "address", "add", f"{first.address}/24", "dev", "wire")
    first.run("ip", "link", "set", "wire", "up")
    for index, holder in enumerate(others, start=1):
        first.run("ip", "link", "set", f"wire{index}", "master", "wire")
        first.run("ip", "link", "set", f"wire{index}", "up")
        machine = Machine(holder.pid, f"{_NET}.{index + 1}")
        machine.run("ip", "link", "set", "lo", "up")
        machine.run("ip", "address", "add", f"{machine.address}/24", "dev", "wire")
        machine.run("ip", "link", "set", "wire", "up")


def _hold(stack: contextlib.ExitStack, command: list[str]) -> subprocess.Popen[bytes]:
    """A process that does nothing in a namespace of its own, until the block ends."""
    process = subprocess.Popen(
        [*command, "sh", "-c", "echo there; exec sleep 600"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    stack.enter_context(process)
    stack.callback(process.kill)
    assert process.stdout is not None
    assert process.stderr is not None
    if not process.stdout.readline():
        pytest.skip(f"no network namespaces here: {process.stderr.read().decode().strip()}")
    return process


def _path() -> str:
    return os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
