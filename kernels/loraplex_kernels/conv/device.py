"""The causal convolution on a device: plans, checks and launches around a kernel that it is given.

Knows no kernel language.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from loraplex_kernels.attention.paged_plan import IntArray
from loraplex_kernels.attention.tiles import power_of_two
from loraplex_kernels.conv import ConvPlan, ConvWeights, StaticConvPlan
from loraplex_kernels.conv.shapes import check_inputs
from loraplex_kernels.lora.device_launch import Launch, Launcher
from loraplex_kernels.state_records import SpanRecords, StaticRecords, count_single, upload
from loraplex_kernels.states import StateSpan

#: a tile: its span, and the first of its rows in that
TILE: Final = 2
#: rows of a chunk's tile: each reads K-1 rows of its neighbour's again, out of the cache
TILE_ROWS: Final = 16
#: channels of a program: 16 bytes a thread of 2-byte values
ROW_CHANNELS: Final = 512
TILE_CHANNELS: Final = 256


@dataclass(frozen=True, slots=True)
class KernelSet:
    """The device code, as ``conv/triton.py`` makes it."""

    convolve: Any
    interpreted: bool


@dataclass(frozen=True, slots=True)
class ConvStep:
    """One step's spans, and the tiles of those of several rows, ``[n, TILE]``."""

    records: SpanRecords
    tiles: torch.Tensor
    num_tokens: int


class StaticConvStep(StaticRecords):
    """A plan for captured graphs: single rows alone, so there are no tiles."""

    def __init__(self, max_sequences: int, device: torch.device) -> None:
        super().__init__(max_sequences, device)
        self.tiles = self.records.table.new_empty((0, TILE))


class DeviceConv:
    """A backend for one device."""

    def __init__(self, name: str, kernels: KernelSet, *, launcher: Launcher = Launch.__call__) -> None:
        self.name = name
        self._kernels = kernels
        self._launcher = launcher

    def prepare(self, spans: Sequence[StateSpan], device: torch.device) -> ConvPlan:
        records, (tiles,) = upload(spans, device, [_tiles(spans)])
        return ConvStep(records, tiles, records.num_tokens)

    def static_plan(self, max_sequences: int, device: torch.device) -> StaticConvPlan | None:
        return StaticConvStep(max_sequences, device)

    def convolve(self, x: torch.Tensor, weights: ConvWeights, states: torch.Tensor, plan: ConvPlan) -> torch.Tensor:
        assert isinstance(plan, ConvStep | StaticConvStep), "a plan of another backend"
        records = plan.records
        check_inputs(x, weights, states, (plan.num_tokens, records.num_spans))
        width, channels = weights.weight.shape[-2:]
        if width - 1 > TILE_ROWS:
            raise ValueError(f"a kernel of width {width}: this backend takes at most {TILE_ROWS + 1}")
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        own = weights.weight.dim() == 3
        strides = (x.stride(0), width * channels if own else 0, channels if own else 0)
        args = (out, x, weights.weight, weights.bias, states, records.table, plan.tiles, records.saves, *strides)
        for items, rows, lanes in (
            (records.num_single, 1, ROW_CHANNELS),
            (len(plan.tiles), TILE_ROWS, TILE_CHANNELS),
        ):
            block = min(lanes, power_of_two(channels))
            options: dict[str, object] = {"WIDTH": width, "CHANNELS": channels, "ROWS": rows, "BLOCK": block}
            options |= {"BEFORE": power_of_two(width - 1), "num_warps": 2 if rows == 1 else 8}
            if items and channels:
                self._launcher(Launch(self._kernels.convolve, items * -(-channels // block), args, options))
        return out


def _tiles(spans: Sequence[StateSpan]) -> IntArray:
    """Of the spans of several rows, in order."""
    first = count_single(spans)
    tiles = [(at, row) for at in range(first, len(spans)) for row in range(0, spans[at].num_rows, TILE_ROWS)]
    return np.array(tiles, dtype=np.int32).reshape(-1, TILE)
