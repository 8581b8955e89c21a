"""Whether what is asked for fits the memory there is: a refusal in numbers instead of an allocation that fails later.

Two questions: before any weight is read, whether the model and the smallest cache could fit at all; and, on a GPU once
the weights are there, whether everything that was promised beside them does. What is refused surely does not fit;
what is accepted may still turn out to be tight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from loraplex.errors import InvalidConfig, OverCapacity
from loraplex.models.footprint import Share

#: where Linux says what memory there is; a container's limit is in one of the two layouts of control groups
_MEMINFO: Final = Path("/proc/meminfo")
_CGROUPS: Final = Path("/sys/fs/cgroup")
_CGROUP_FILES: Final = (
    ("memory.max", "memory.current", "memory.stat", ("active_file", "inactive_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_active_file", "total_inactive_file"),
    ),
)


@dataclass(frozen=True, slots=True)
class Available:
    """Bytes that could be had now, and of what: ``cuda:0``, ``this machine``, ``this container``."""

    nbytes: int
    where: str


def available_memory(device: torch.device) -> Available | None:
    """Memory that is free on ``device``; None where nobody says."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        # what torch holds and does not use is free to us
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Available(free + unused, str(device))
    return host_memory()


def reservable_memory(device: torch.device) -> Available | None:
    """What is left for pools that are reserved at start; None on a CPU, where memory is taken as it is written to."""
    return available_memory(device) if device.type == "cuda" else None


def host_memory(meminfo: Path = _MEMINFO, cgroups: Path = _CGROUPS) -> Available | None:
    """What this process could still take: the least of what the machine and its container's limit leave, and swap.

    File pages count as free, because the kernel drops them when asked. Deliberately no lower than the truth.
    """
    machine = _fields(meminfo, ":")
    if "MemAvailable" not in machine:
        return None
    swap = machine.get("SwapFree", 0) * 1024
    found = [Available(machine["MemAvailable"] * 1024 + swap, "this machine")]
    for limit_file, usage_file, stat_file, file_pages in _CGROUP_FILES:
        limit, usage = _number(cgroups / limit_file), _number(cgroups / usage_file)
        if limit is not None and usage is not None:
            stat = _fields(cgroups / stat_file, "")
            reclaimable = sum(stat.get(name, 0) for name in file_pages)
            found.append(Available(max(0, limit - usage + reclaimable) + swap, "this container"))
    return min(found, key=lambda available: available.nbytes)


def require(shares: Sequence[Share], available: Available | None, what: str, advice: str) -> None:
    """Raise InvalidConfig unless all of ``shares``, which ``what`` needs, fit; ``advice`` is what could be changed."""
    needed = sum(share.nbytes for share in shares)
    if available is None or needed <= available.nbytes:
        return
    parts = ", ".join(f"{share.what} {_mib(share.nbytes)}" for share in shares)
    raise InvalidConfig(
        f"{what} needs at least {_mib(needed)} ({parts}); {_mib(available.nbytes)} are free on {available.where}: "
        f"{advice}"
    )


@contextmanager
def taking_memory(what: str) -> Iterator[None]:
    """Turn a GPU's want of memory inside the block into OverCapacity; ``what`` is being done there."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OverCapacity(
            f"out of memory while {what}: {error} (--max-num-seqs, --max-num-batched-tokens, --kv-cache-memory and "
            f"--adapter-memory take it)"
        ) from error


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.0f} MiB" if nbytes >= 10 << 20 else f"{nbytes / (1 << 20):,.2f} MiB"


def _fields(path: Path, separator: str) -> dict[str, int]:
    """``name`` -> number, of a file with one ``name number`` a line; empty when there is no such file."""
    found: dict[str, int] = {}
    for line in _read(path).splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdigit():
            found[words[0].removesuffix(separator)] = int(words[1])
    return found


def _number(path: Path) -> int | None:
    """The file's number; None when it says ``max`` or is not there."""
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
