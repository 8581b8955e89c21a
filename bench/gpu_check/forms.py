"""Tile sizes of the low-rank kernels, swept: what the decode form of ``device_layout.FORMS`` ought to be on this card.

A section of its own, asked for by ``--only forms``: every candidate is compiled for every layer, which takes minutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Final

from bench.gpu_check.section import Row, Section, Setting
from bench.ops import lora
from bench.ops.options import Options
from bench.ops.shapes import SHAPES, even_traffic
from loraplex_kernels.lora.device import DeviceLora
from loraplex_kernels.lora.device_launch import GridKernels
from loraplex_kernels.lora.device_layout import FORMS, Form
from loraplex_kernels.lora.uploads import queue_for

#: what each candidate changes in the decode form
CANDIDATES: Final[Mapping[str, Mapping[str, int]]] = MappingProxyType(
    {
        "as it is": {},
        "splits of 1,024": {"split_k": 1024, "max_splits": 8},
        "splits of 2,048": {"split_k": 2048, "max_splits": 4},
        "256 columns": {"block_n": 256},
        "32 rows, splits of 1,024": {"block_m": 32, "split_k": 1024, "max_splits": 8},
        "three stages of 128": {"stages": 3, "block_k": 128},
        "two programs": {"programs_per_sm": 2},
    }
)
RANKS = (16, 64)
#: (rows, distinct adapters): launches count, bytes count, rows count
TRAFFICS = ((1, 1), (32, 32), (128, 4))


def run(setting: Setting) -> Iterator[Row]:
    """A row for each rank, step, layer, backend and candidate. Raises WrongResult before a wrong one's time is told."""
    candidates = dict(list(CANDIDATES.items())[:2]) if setting.dry else CANDIDATES
    made = {
        f"{'triton-fused' if fused else 'triton'}, {name}": partial(_backend, {**change}, fused=fused)
        for name, change in candidates.items()
        for fused in (False, True)
    }
    shapes = SHAPES["tiny" if setting.dry else "llama-8b"]
    traffics = tuple(even_traffic(*traffic) for traffic in (((3, 2),) if setting.dry else TRAFFICS))
    for rank in RANKS[:1] if setting.dry else RANKS:
        options = Options(
            backends=(),
            device=setting.device,
            dtype=setting.dtype,
            shapes=replace(shapes, ranks=(rank,), traffics=traffics),
            repeats=1 if setting.dry else 5,
            calls=1 if setting.dry else 10,
        )
        report = lora.run(options, made=made)
        for row in report.rows:
            for timing in row.timings:
                yield {
                    "rank": rank,
                    "step": row.step,
                    "layer": row.layer,
                    "form": timing.way,
                    "us": timing.us,
                    "replay_us": timing.replay_us,
                    "share_of_copy_speed": report.share(row, timing),
                }


def _backend(change: dict[str, int], *, fused: bool) -> DeviceLora:
    from loraplex_kernels.lora.triton import KERNELS

    form: Form = replace(FORMS.decode, **change)  # type: ignore[arg-type]
    kernels = GridKernels(KERNELS, fused=fused, forms=replace(FORMS, decode=form))
    return DeviceLora("triton-fused" if fused else "triton", kernels, queue_for)


SECTION = Section("forms", run, 60.0)
