"""The contract of the state-space scan, for every backend that runs here, against the recurrence in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from loraplex_kernels.ssd import SsdBackend, SsdInputs, SsdParameters
from loraplex_kernels.states import BLANK, StateSpan, check_spans
from loraplex_kernels.testing import worst_excess
from tests.ops.ssd_layers import EXCESS, NO_LIMITS, SIZES, SsdLayer, SsdSize, make_layer
from tests.ops.state_subjects import (
    FEW,
    NUM_SLOTS,
    SSD_SUBJECTS,
    STEPS,
    Subject,
    combinations,
    keep_only,
    matrix,
    read_slots,
    rows_of,
    same_bits,
    written_slots,
)

MIXED = STEPS["decodes and chunks"]
NAN = float("nan")


@pytest.mark.parametrize(
    ("ssd", "dtype", "size", "step", "own", "limits"),
    matrix(SSD_SUBJECTS, SIZES, tuple(STEPS), (False, True), (NO_LIMITS, (0.1, 0.3), (0.15, math.inf))),
    indirect=["ssd"],
)
def test_steps_match_the_formula(
    ssd: Subject[SsdBackend],
    dtype: torch.dtype,
    size: SsdSize,
    step: str,
    own: bool,
    limits: tuple[float, float],
) -> None:
    spans = STEPS[step]
    check_spans(spans, NUM_SLOTS)
    layer = make_layer(spans, size, dtype, own=own, limits=limits)
    y, states = layer.on(ssd, spans)
    wanted, kept = layer.expected(spans)
    assert worst_excess(y, wanted, dtype) <= EXCESS
    written = written_slots(spans)
    assert worst_excess(states[sorted(written)], kept[sorted(written)], torch.float32) <= EXCESS
    others = sorted(set(range(NUM_SLOTS)) - written)
    assert same_bits(states[others], layer.states[others])


def test_what_other_slots_hold_reaches_nothing(ssd: Subject[SsdBackend]) -> None:
    """Not even what a slot of one's own held before the sequence began."""
    layer = make_layer(FEW, SIZES[2], ssd.dtype)
    poisoned = replace(layer, states=keep_only(layer.states, read_slots(FEW)))
    y, states = layer.on(ssd, FEW)
    other_y, other_states = poisoned.on(ssd, FEW)
    assert same_bits(y, other_y)
    written = sorted(written_slots(FEW))
    assert same_bits(states[written], other_states[written])


@pytest.mark.parametrize(
    ("ssd", "bad", "name"),
    combinations(SSD_SUBJECTS, range(len(FEW)), ("x", "dt", "b", "c", "a", "d", "dt_bias")),
    indirect=["ssd"],
)
def test_no_value_of_a_span_reaches_another(ssd: Subject[SsdBackend], bad: int, name: str) -> None:
    layer = make_layer(FEW, SIZES[2], ssd.dtype, own=True)
    clean, clean_states = layer.on(ssd, FEW)
    rows, span = rows_of(FEW)[bad], FEW[bad]
    y, states = _poisoned(layer, name, rows, bad).on(ssd, FEW)
    assert y[rows].isnan().all()
    if name not in ("c", "d"):
        assert states[span.slot].isnan().all()
    rest = torch.ones(len(y), dtype=torch.bool)
    rest[rows] = False
    assert same_bits(y[rest], clean[rest])
    slots = sorted(set(range(NUM_SLOTS)) - written_slots([span]))
    assert same_bits(states[slots], clean_states[slots])


def _poisoned(layer: SsdLayer, name: str, rows: slice, index: int) -> SsdLayer:
    """NaN in one of a span's inputs or parameters."""
    if hasattr(layer.inputs, name):
        values = getattr(layer.inputs, name).clone()
        values[rows] = NAN
        return replace(layer, inputs=replace(layer.inputs, **{name: values}))
    values = getattr(layer.parameters, name).clone()
    values[index] = NAN
    return replace(layer, parameters=replace(layer.parameters, **{name: values}))


@pytest.mark.parametrize("row", [0, 5, 40, 69])
def test_a_poisoned_row_shows_from_there_on(ssd: Subject[SsdBackend], row: int) -> None:
    """Or nothing would ever end it. In the head whose value it is alone; rows before may show it, too: in a chunk,
    what they leave out of it is zero times NaN."""
    spans = (StateSpan(70, slot=1, source=2),)
    layer = make_layer(spans, SIZES[0], ssd.dtype)
    layer.inputs.x[row, 2] = NAN
    y, states = layer.on(ssd, spans)
    by_head = y.view(70, 4, -1).isnan()
    assert by_head[row:, 2].all()
    assert not by_head[:, [0, 1, 3]].any()
    assert states[1, 2].isnan().all()
    assert not states[1, [0, 1, 3]].isnan().any()


def test_alone_as_beside_others(ssd: Subject[SsdBackend]) -> None:
    layer = make_layer(MIXED, SIZES[2], ssd.dtype, own=True)
    together, states = layer.on(ssd, MIXED)
    for index, (span, rows) in enumerate(zip(MIXED, rows_of(MIXED), strict=True)):
        y, its_states = layer.of(index, rows).on(ssd, [span])
        written = sorted(written_slots([span]))
        if ssd.entry.same_alone:
            assert same_bits(together[rows], y)
            assert same_bits(states[written], its_states[written])
        assert worst_excess(together[rows], y, ssd.dtype) <= EXCESS
        assert worst_excess(states[written], its_states[written], torch.float32) <= EXCESS


@pytest.mark.parametrize("cuts", [(1, 2), (3, 67), (64, 65), (60, 79)])
def test_a_prompt_in_chunks_is_the_whole(ssd: Subject[SsdBackend], cuts: tuple[int, int]) -> None:
    whole = (StateSpan(80, slot=1, num_limited=70),)
    layer = make_layer(whole, SIZES[3], ssd.dtype, own=True, limits=(0.1, 0.3))
    wanted, end = layer.on(ssd, whole)
    states, ys, source = layer.states, [], BLANK
    for start, stop in zip((0, *cuts), (*cuts, 80), strict=True):
        chunk = replace(layer.of(0, slice(start, stop)), states=states)
        limited = max(0, min(stop, 70) - start)
        y, states = chunk.on(ssd, [StateSpan(stop - start, slot=2, source=source, num_limited=limited)])
        ys.append(y)
        source = 2
    assert worst_excess(states[2], end[1], torch.float32) <= EXCESS
    assert worst_excess(torch.cat(ys), wanted, ssd.dtype) <= EXCESS


def test_a_long_prompt(ssd: Subject[SsdBackend]) -> None:
    """Of more rows than any backend takes at a time."""
    spans = (StateSpan(330, slot=1, source=2),)
    layer = make_layer(spans, SIZES[3], ssd.dtype)
    y, states = layer.on(ssd, spans)
    wanted, kept = layer.expected(spans)
    assert worst_excess(y, wanted, ssd.dtype) <= EXCESS
    assert worst_excess(states, kept, torch.float32) <= EXCESS


def test_small_and_large_time_steps(ssd: Subject[SsdBackend]) -> None:
    """The softplus is near its value over all of its range, and so are decays until they are nothing."""
    dt = torch.linspace(-60, 60, 81)
    heads, spans = len(dt), (StateSpan(1, slot=0, source=1),)
    inputs = SsdInputs(torch.ones(1, heads, 1), dt[None], torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    zeros, states = torch.zeros(heads), torch.zeros(NUM_SLOTS, heads, 1, 1)
    y, _ = SsdLayer(inputs, SsdParameters(-torch.ones(heads), zeros, zeros), states).on(ssd, spans)
    steps = torch.logaddexp(dt.double(), torch.zeros(1, dtype=torch.float64))
    assert ((y[0].double() - steps).abs() <= 2e-6 * steps).all()
    states[1] = 1
    a = -torch.linspace(0.1, 5, heads)
    decays = torch.exp(steps * a)
    nothing = replace(inputs, x=torch.zeros(1, heads, 1))
    y, _ = SsdLayer(nothing, SsdParameters(a, zeros, zeros), states).on(ssd, spans)
    assert ((y[0].double() - decays).abs() <= 2e-5 * decays + 1e-30).all()


def test_states_outlive_many_strong_decays(ssd: Subject[SsdBackend]) -> None:
    """Decays between far rows may be nothing; their logarithms' sum is large, and no row divides by it."""
    spans = (StateSpan(150, slot=1, source=2),)
    layer = make_layer(spans, SIZES[3], torch.float32)
    layer.inputs.dt[::7] = 6.0
    layer = replace(layer, parameters=replace(layer.parameters, a=torch.full((2,), -16.0)))
    y, states = layer.on(ssd, spans)
    wanted, kept = layer.expected(spans)
    assert worst_excess(y, wanted, torch.float32) <= 5 * EXCESS
    assert worst_excess(states[1], kept[1], torch.float32) <= 5 * EXCESS


def test_no_rows(ssd: Subject[SsdBackend]) -> None:
    layer = make_layer((), SIZES[0], ssd.dtype)
    y, states = layer.on(ssd, ())
    assert y.shape == (0, 64)
    assert same_bits(states, layer.states)


def test_what_does_not_fit_is_refused(ssd: Subject[SsdBackend]) -> None:
    spans = STEPS["decodes"]
    device = ssd.device
    layer = make_layer(spans, SIZES[1], ssd.dtype)
    plan = ssd.backend.prepare(spans, device)
    given = {name: getattr(layer.inputs, name).to(device) for name in ("x", "dt", "b", "c")}
    names = ("a", "d", "dt_bias")
    inputs = SsdInputs(**given)
    parameters = SsdParameters(**{name: getattr(layer.parameters, name).to(device) for name in names})
    states = layer.states.to(device)
    other = torch.float32 if ssd.dtype is not torch.float32 else torch.float16
    for wrong, message in (
        (replace(inputs, x=inputs.x[:3]), "x is "),
        (replace(inputs, x=inputs.x.transpose(1, 2).contiguous().transpose(1, 2)), "side by side"),
        (replace(inputs, dt=inputs.dt[:, :5]), "dt is "),
        (replace(inputs, b=inputs.b[:, :, :5]), "b is "),
        (replace(inputs, b=inputs.b[:, [0, 0, 0, 1]]), "b is "),
        (replace(inputs, c=inputs.c.to(other)), "c is "),
    ):
        with pytest.raises(ValueError, match=message):
            ssd.backend.scan(wrong, parameters, states, plan)
    for name in names:
        vector = getattr(parameters, name)
        for bad in (vector[1:], vector.double(), vector.expand(2, -1).contiguous()):
            with pytest.raises(ValueError, match=" is torch"):
                ssd.backend.scan(inputs, replace(parameters, **{name: bad}), states, plan)
    for slots in (states.half(), states[:, :, :, 1:], states[:, 1:].contiguous()):
        with pytest.raises(ValueError, match=r"states are |x is |b is "):
            ssd.backend.scan(inputs, parameters, slots, plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_tolerances_can_fail(dtype: torch.dtype) -> None:
    """A state left out, limits left out, neighbours' B, and a d dropped, each made once: all are far outside what is
    allowed."""
    layer = make_layer(MIXED, SIZES[2], dtype, limits=(0.15, 0.2))
    inputs, parameters = layer.inputs, layer.parameters
    right, kept = layer.expected(MIXED)
    wrong = (
        replace(layer, states=layer.states * 0),
        replace(layer, inputs=replace(inputs, b=inputs.b.roll(1, 1))),
        replace(layer, inputs=replace(inputs, b=inputs.b.roll(1, 0))),
        replace(layer, parameters=replace(parameters, d=parameters.d * 0)),
        replace(layer, parameters=replace(parameters, limits=NO_LIMITS)),
        replace(layer, parameters=replace(parameters, dt_bias=parameters.dt_bias.roll(1))),
    )
    for each in wrong:
        y, states = each.expected(MIXED)
        assert worst_excess(y.to(dtype), right, dtype) > 2.5 * EXCESS
        if each.parameters.d is parameters.d:
            assert worst_excess(states, kept, torch.float32) > 1000
