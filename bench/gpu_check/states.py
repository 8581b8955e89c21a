"""The kernels of state-space layers beside plain torch and their byte limits, at the sizes of mamba2-2.7b: decodes,
prompts, and both in one step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from bench.gpu_check.ops import options_for, rows_of
from bench.gpu_check.section import Row, Section, Setting
from bench.ops import conv, ssd
from bench.ops.shapes import SHAPES, MixerShape, OpShapes, state_steps
from bench.ops.timing import stopwatch_for

BACKENDS = ("triton",)
MIXER: Final = MixerShape("mamba2-2.7b", 80, 64, 1, 128)


def run(setting: Setting) -> Iterator[Row]:
    """A row for each step, part and way; raises WrongResult before the time of a wrong way is told."""
    options = replace(options_for(setting, BACKENDS), shapes=_shapes(setting))
    for op in (conv, ssd):
        yield from rows_of(op.run(options, stopwatch_for(setting.device)))


def _shapes(setting: Setting) -> OpShapes:
    if setting.dry:  # the interpreter takes its time
        return replace(SHAPES["tiny"], state_steps=state_steps((2,), (20,))[-1:])
    return replace(SHAPES["llama-8b"], mixer=MIXER, state_steps=state_steps((1, 8, 32, 128), (512, 4096)))


SECTION = Section("states", run, 20.0)
