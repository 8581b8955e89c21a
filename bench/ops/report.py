"""What a benchmark of an op found, as plain values, and as JSON."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.machine import versions
from bench.ops.options import Options
from bench.ops.timing import Timing
from bench.result_file import write_result

SCHEMA = 1
PACKAGES = ("torch", "triton")


@dataclass(frozen=True, slots=True)
class Row:
    """One step at one layer, every way."""

    step: str
    layer: str
    """Empty for an op that is the same at every layer."""
    num_bytes: int
    """The least that memory has to move: each input read once, each output written once."""
    num_sets: int
    """Sets of inputs that were rotated."""
    timings: tuple[Timing, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """One run of one op's benchmark."""

    op: str
    shapes: str
    device: str
    device_name: str
    dtype: str
    threads: int
    copy_bytes_per_s: float | None
    """Measured in the same run; None where inputs were not made to come from memory."""
    rows: tuple[Row, ...]

    def limit_us(self, row: Row) -> float | None:
        """The least time of a row: its bytes at a copy's speed."""
        return None if self.copy_bytes_per_s is None else row.num_bytes / self.copy_bytes_per_s * 1e6

    def share(self, row: Row, timing: Timing) -> float | None:
        """How much of the copy's speed a way reached, replayed where it was; 1 is the limit."""
        limit_us = self.limit_us(row)
        return None if limit_us is None else limit_us / (timing.us if timing.replay_us is None else timing.replay_us)


def report(
    op: str, options: Options, copy_bytes_per_s: float | None, rows: tuple[Row, ...], *, model: str = ""
) -> Report:
    """The rows with what was asked for and where they were measured. ``model``: whose sizes, where they are not those
    of the shapes' transformer."""
    device = options.device
    return Report(
        op=op,
        shapes=model or options.shapes.model.name,
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        dtype=str(options.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        copy_bytes_per_s=copy_bytes_per_s,
        rows=rows,
    )


def write(found: Report, command: list[str], path: Path) -> None:
    """As JSON, made whole or not at all."""
    facts = {"system": platform.platform(), "versions": versions(PACKAGES), **asdict(found)}
    write_result(path, SCHEMA, command, facts)
