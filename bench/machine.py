"""What a measurement was taken on and how it was asked for: processor, versions and commit, the command without folder
names."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import psutil

from loraplex import __version__


class Machine(msgspec.Struct, frozen=True):
    """Processor, cores, memory, system."""

    processor: str
    cores: int
    memory_bytes: int
    system: str


def machine() -> Machine:
    """The machine that this runs on."""
    return Machine(_processor(), psutil.cpu_count() or 1, psutil.virtual_memory().total, platform.platform())


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's, Loraplex's with its commit, and those of ``packages``, "not installed" for one that is not."""
    own = {"python": sys.version.split()[0], "loraplex": __version__, "commit": _commit()}
    return own | {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Of the checkout that this file is in, with "+" where tracked files differ from it; "unknown" outside of one."""
    describe = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(
            describe, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def shown_command(words: Iterable[str]) -> list[str]:
    """A command line without the folders of whoever measured: of an absolute path only the name is left."""
    return [_shown_word(word) for word in words]


def _shown_word(word: str) -> str:
    option, equals, value = word.partition("=")
    if equals and option.startswith("-"):
        return f"{option}={_shown_word(value)}"
    return Path(word).name if Path(word).is_absolute() else word


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
