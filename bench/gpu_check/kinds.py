"""Decode speed with adapters of eight kinds: each by itself, those of tables together, and all in one batch.

Both sides of a ratio are the same engine: the batch, between two of base-only requests.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.gpu_check.decode import decode_s, engine_for, steps_for
from bench.gpu_check.dummy import shape_of, write_config
from bench.gpu_check.dummy_kinds import KINDS, TABLE_KINDS, load_kind
from bench.gpu_check.section import OutOfTime, Row, Section, Setting

BACKEND = "triton"
FULL = (16, 64)
DRY = (len(KINDS),)
#: what is asked for together; what says most first
TOGETHER = {"all eight": tuple(KINDS), "the five of tables": tuple(TABLE_KINDS), **{kind: (kind,) for kind in KINDS}}
#: one that every kind is in, and one of graphs that scale inputs
DRY_MIXES = ("all eight", "ia3")
#: a cell, its base sides included, takes about a second
CELL_S = 3.0


def run(setting: Setting) -> Iterator[Row]:
    """A row for each kind's load, and for each batch and mix of kinds."""
    batches, steps = (DRY if setting.dry else FULL), steps_for(setting)
    with tempfile.TemporaryDirectory(prefix="loraplex-gpu-check-") as folder:
        model_dir = write_config(shape_of(setting.dry), Path(folder))
        engine = engine_for(setting, model_dir, BACKEND, max(batches), lambda model: partial(load_kind, model))
        for kind in KINDS:
            info = engine.load_adapter(kind, kind)
            change = None if info.probe is None else info.probe.max_change
            yield {"what": "an adapter", "kind": kind, "bytes": info.bytes, "largest_change_of_a_logit": change}
        for batch in batches:
            for name in DRY_MIXES if setting.dry else TOGETHER:
                kinds = TOGETHER[name]
                if setting.left_s() < CELL_S and not setting.dry:
                    raise OutOfTime(f"before batch {batch}, {name}")
                base_s = decode_s(engine, steps, ("",) * batch)
                step_s = decode_s(engine, steps, tuple(kinds[row * len(kinds) // batch] for row in range(batch)))
                base_s = (base_s + decode_s(engine, steps, ("",) * batch)) / 2
                yield {
                    "kinds": name,
                    "batch": batch,
                    "base_step_ms": base_s * 1e3,
                    "step_ms": step_s * 1e3,
                    "tokens_per_s": batch / step_s,
                    "retention": base_s / step_s,
                }


SECTION = Section("kinds", run, 45.0)
