"""Each kernel beside plain torch and its byte limit, as ``python -m bench.ops`` measures it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

from bench.gpu_check.section import Row, Section, Setting
from bench.ops import attention, lora
from bench.ops.options import Options
from bench.ops.report import Report
from bench.ops.shapes import SHAPES, OpShapes
from loraplex_kernels.attention import Target
from loraplex_kernels.backend import ATTENTION, DEFAULT_PAGE_SIZE, LORA, BackendEntry

REPEATS = 7

B = TypeVar("B")
W = TypeVar("W")


def run(setting: Setting) -> Iterator[Row]:
    """A row for each step, layer and way; raises WrongResult before the time of a wrong way is told."""
    device = setting.device
    yield from rows_of(lora.run(options_for(setting, _for_gpus(LORA, device))))
    target = Target(device, setting.dtype, DEFAULT_PAGE_SIZE)
    yield from rows_of(attention.run(options_for(setting, _for_gpus(ATTENTION, target))))


def _for_gpus(entries: Mapping[str, BackendEntry[B, W]], where: W) -> tuple[str, ...]:
    """The backends that are made for GPUs and run here."""
    elsewhere = ("cpu", "reference")
    return tuple(name for name, entry in entries.items() if name not in elsewhere and entry.available(where) is None)


def options_for(setting: Setting, backends: tuple[str, ...]) -> Options:
    """What the benchmarks of ops are asked for."""
    return Options(
        backends=backends,
        device=setting.device,
        dtype=setting.dtype,
        shapes=_tiny() if setting.dry else SHAPES["llama-8b"],
        repeats=1 if setting.dry else REPEATS,
        calls=1 if setting.dry else 10,
    )


def _tiny() -> OpShapes:
    """A decode step and one with a chunk, of each op: the interpreter takes its time."""
    tiny = SHAPES["tiny"]
    return replace(tiny, traffics=tiny.traffics[-2:], attention_steps=tiny.attention_steps[-2:])


def rows_of(report: Report) -> Iterator[Row]:
    """A row for each step, layer and way."""
    for row in report.rows:
        for timing in row.timings:
            yield {
                "op": report.op,
                "step": row.step,
                "layer": row.layer or None,
                "way": timing.way,
                "us": timing.us,
                "replay_us": timing.replay_us,
                "limit_us": report.limit_us(row),
                "share_of_copy_speed": report.share(row, timing),
            }


SECTION = Section("ops", run, 60.0)
