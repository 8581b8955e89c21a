"""What device plans of the convolution and the scan hold: records, tiles, chunks; and what their backends refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from loraplex_kernels import state_records
from loraplex_kernels.conv import ConvWeights
from loraplex_kernels.conv.device import TILE_ROWS, ConvStep, DeviceConv, KernelSet
from loraplex_kernels.lora.device_launch import Launch
from loraplex_kernels.ssd import SsdInputs, SsdParameters, device_launch
from loraplex_kernels.ssd.device import DeviceSsd
from loraplex_kernels.ssd.device_launch import MAX_STATE, SsdKernels
from loraplex_kernels.ssd.device_plan import NO_SAVE, prepare
from loraplex_kernels.states import BLANK, StateSpan
from tests.ops.state_subjects import CPU

SPANS = (
    StateSpan(1, slot=4, source=4, saves=((1, 5),), num_limited=1),
    StateSpan(100, slot=6, source=2, saves=((16, 7), (80, 8), (100, 9)), num_limited=70),
    StateSpan(2, slot=10),
)


def never(launch: Launch) -> None:
    raise AssertionError(f"{launch.kernel} was launched")


def conv() -> DeviceConv:
    return DeviceConv("", KernelSet(None, interpreted=True), launcher=never)


def ssd() -> DeviceSsd:
    return DeviceSsd("", SsdKernels(device_launch.KernelSet(*[None] * 5, interpreted=True), launcher=never))


def test_records_say_what_each_sequence_does() -> None:
    records, lists = state_records.upload(SPANS, CPU, [])
    assert not lists
    assert (records.num_single, records.num_tokens, records.num_spans) == (1, 103, 3)
    # first row, rows, source, slot, limited, first save, saves
    assert records.table[:, :7].tolist() == [
        [0, 1, 4, 4, 1, 0, 1],
        [1, 100, 2, 6, 70, 1, 3],
        [101, 2, BLANK, 10, 0, 4, 0],
    ]
    assert records.saves.tolist() == [[1, 5], [16, 7], [80, 8], [100, 9]]


def test_chunks_end_where_states_are_wanted() -> None:
    step = prepare(SPANS, CPU, 48)
    # span, first row of the step, rows, limited, slot
    assert step.chunks.tolist() == [
        [1, 1, 16, 16, 7],
        [1, 17, 48, 48, NO_SAVE],
        [1, 65, 16, 6, 8],
        [1, 81, 20, 0, 9],
        [2, 101, 2, 0, NO_SAVE],
    ]
    assert step.runs.tolist() == [[1, 0, 4], [2, 4, 1]]


def test_tiles_are_those_of_chunks() -> None:
    step = conv().prepare(SPANS, CPU)
    assert isinstance(step, ConvStep)
    assert step.tiles.tolist() == [*([1, row] for row in range(0, 100, TILE_ROWS)), [2, 0]]


@pytest.mark.parametrize("backend", [conv(), ssd()], ids=["conv", "ssd"])
def test_a_plan_is_one_copy(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []

    def counted(array: Any, device: torch.device) -> torch.Tensor:
        copies.append(array.nbytes)
        return torch.from_numpy(array)

    monkeypatch.setattr(state_records, "host_array", counted)
    for spans in (SPANS, SPANS[:1], ()):
        backend.prepare(spans, CPU)
    assert len(copies) == 3
    backend.static_plan(4, CPU).set(())
    assert len(copies) == 5
    assert max(copies) < 1024


@pytest.mark.parametrize("backend", [conv(), ssd()], ids=["conv", "ssd"])
def test_single_rows_come_first(backend: Any) -> None:
    spans: Sequence[StateSpan] = (*SPANS, StateSpan(1, slot=11))
    with pytest.raises(ValueError, match="sequence 1 of the step has several rows; those of one row come first"):
        backend.prepare(spans, CPU)


def test_sizes_beyond_the_kernels_are_refused() -> None:
    spans, size = (StateSpan(1, 0),), MAX_STATE + 1
    inputs = SsdInputs(torch.ones(1, 1, 1), torch.ones(1, 1), torch.ones(1, 1, size), torch.ones(1, 1, size))
    parameters = SsdParameters(*torch.ones(3, 1).unbind(0))
    backend = ssd()
    with pytest.raises(ValueError, match="257 elements a row: this backend takes at most 256"):
        backend.scan(inputs, parameters, torch.ones(1, 1, 1, size), backend.prepare(spans, CPU))
    wide = TILE_ROWS + 2
    weights = ConvWeights(torch.ones(wide, 3), None)
    convolution = conv()
    with pytest.raises(ValueError, match="width 18: this backend takes at most 17"):
        convolution.convolve(torch.ones(1, 3), weights, torch.ones(1, wide - 1, 3), convolution.prepare(spans, CPU))
