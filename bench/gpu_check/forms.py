"""Tile sizes of the low-rank kernels, swept: what ``device_layout.FORMS`` ought to say on this card.

Every candidate computes the same product at the 8B shape's packed layers, replayed from a graph where there are graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import torch

from bench.gpu_check.dummy import random_delta, shape_of
from bench.gpu_check.section import OutOfTime, Row, Section, Setting
from bench.limits.shapes import PackedLayer
from bench.ops.shapes import Traffic, even_traffic
from bench.ops.timing import Stopwatch, Way, WrongResult, measure, num_sets, stopwatch_for
from loraplex_kernels.lora import LoraBackend
from loraplex_kernels.lora.device import DeviceLora
from loraplex_kernels.lora.device_launch import GridKernels
from loraplex_kernels.lora.device_layout import FORMS, Form
from loraplex_kernels.lora.reference import ReferenceLora
from loraplex_kernels.lora.uploads import queue_for
from loraplex_kernels.segments import Segment, SegmentPlan, Term
from loraplex_kernels.testing import worst_excess

#: what each candidate changes in the decode form
CANDIDATES: Final[Mapping[str, Mapping[str, int]]] = MappingProxyType(
    {
        "as it is": {},
        "longer splits": {"split_k": 1024, "max_splits": 8},
        "longest splits": {"split_k": 2048, "max_splits": 4},
        "wide columns": {"block_n": 256},
        "tall tiles": {"block_m": 32},
        "tall tiles, longest splits": {"block_m": 64, "split_k": 2048, "max_splits": 4, "warps": 8, "registers": 64},
        "three stages": {"stages": 3, "block_k": 128},
        "two programs": {"programs_per_sm": 2, "registers": 255},
    }
)
RANKS = (16, 64)
#: (rows, distinct adapters)
TRAFFICS = ((1, 1), (32, 4), (32, 32), (128, 1), (128, 32))
MAX_BYTES = 1 << 36
CASE_S = 2.0


@dataclass(frozen=True, slots=True)
class Case:
    """One product."""

    setting: Setting
    layer: PackedLayer
    traffic: Traffic
    rank: int


def run(setting: Setting) -> Iterator[Row]:
    """A row for each backend, candidate, rank, traffic and layer that matters."""
    candidates = dict(list(CANDIDATES.items())[:2]) if setting.dry else CANDIDATES
    traffics = ((3, 2),) if setting.dry else TRAFFICS
    layers = [layer for layer in shape_of(setting.dry).packed_layers if layer.name in ("qkv", "down")]
    for rank in RANKS[:1] if setting.dry else RANKS:
        for rows, distinct in traffics:
            for layer in layers[:1] if setting.dry else layers:
                if setting.left_s() < CASE_S and not setting.dry:
                    raise OutOfTime(f"before rank {rank}, {rows} rows, {distinct} adapters, {layer.name}")
                case = Case(setting, layer, even_traffic(rows, distinct), rank)
                yield from _rows(case, candidates)


def _rows(case: Case, candidates: Mapping[str, Mapping[str, int]]) -> Iterator[Row]:
    stopwatch = stopwatch_for(case.setting.device)
    expected = _result(case, ReferenceLora())
    ways = []
    for name, change in candidates.items():
        for fused in (False, True):
            backend = _backend(replace(FORMS.decode, **change), fused=fused)
            label = f"{backend.name}, {name}"
            excess = worst_excess(_result(case, backend), expected, case.setting.dtype)
            if excess > 1:
                raise WrongResult(f"{label}, {case.traffic.name}, {case.layer.name}: {excess:.1f} times the tolerance")
            ways.append(_way(case, label, _backend(replace(FORMS.decode, **change), fused=fused), stopwatch))
    for timing in measure(ways, stopwatch, repeats=1 if case.setting.dry else 5, calls=1 if case.setting.dry else 10):
        yield {
            "form": timing.way,
            "rank": case.rank,
            "step": case.traffic.name,
            "layer": case.layer.name,
            "us": timing.us,
            "replay_us": timing.replay_us,
        }


def _backend(form: Form, *, fused: bool) -> LoraBackend:
    from loraplex_kernels.lora.triton import KERNELS

    kernels = GridKernels(KERNELS, fused=fused, forms=replace(FORMS, decode=form))
    return DeviceLora("triton-fused" if fused else "triton", kernels, queue_for)


def _result(case: Case, backend: LoraBackend) -> torch.Tensor:
    """What one set of adapters adds to zeros."""
    way = _calls(case, backend, 1)
    return way[1][0]() if False else way[0]


def _way(case: Case, label: str, backend: LoraBackend, stopwatch: Stopwatch) -> Way:
    """Rotating over enough sets of adapters that their factors come from memory."""
    layer = case.layer
    set_bytes = case.traffic.num_slots * (layer.a_bytes(case.rank) + layer.b_bytes(case.rank))
    _, calls = _calls(case, backend, num_sets(stopwatch, set_bytes))
    return Way(label, tuple(calls), capturable=True)
