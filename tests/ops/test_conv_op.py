"""The contract of the causal convolution, for every backend that runs here, against the formula in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraplex_kernels.conv import ConvBackend, ConvWeights
from loraplex_kernels.states import BLANK, StateSpan, check_spans
from loraplex_kernels.testing import worst_excess
from tests.ops.conv_layers import SIZES, ConvSize, make_layer
from tests.ops.state_subjects import (
    CONV_SUBJECTS,
    FEW,
    NUM_SLOTS,
    STEPS,
    Subject,
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
    ("conv", "dtype", "size", "step", "bias", "own"),
    matrix(CONV_SUBJECTS, SIZES, tuple(STEPS), (True, False), (False, True)),
    indirect=["conv"],
)
def test_steps_match_the_formula(
    conv: Subject[ConvBackend], dtype: torch.dtype, size: ConvSize, step: str, bias: bool, own: bool
) -> None:
    spans = STEPS[step]
    check_spans(spans, NUM_SLOTS)
    layer = make_layer(spans, size, dtype, bias=bias, own=own)
    out, states = layer.on(conv, spans)
    wanted, kept = layer.expected(spans)
    assert worst_excess(out, wanted, dtype) <= 1
    assert same_bits(states, kept)  # those written, and all others as they were


def test_what_other_slots_hold_reaches_nothing(conv: Subject[ConvBackend]) -> None:
    """Not even what a slot of one's own held before the sequence began."""
    layer = make_layer(FEW, SIZES[1], conv.dtype)
    poisoned = replace(layer, states=keep_only(layer.states, read_slots(FEW)))
    out, states = layer.on(conv, FEW)
    other_out, other_states = poisoned.on(conv, FEW)
    assert same_bits(out, other_out)
    written = sorted(written_slots(FEW))
    assert same_bits(states[written], other_states[written])


@pytest.mark.parametrize("bad", range(len(FEW)))
def test_no_value_of_a_span_reaches_another(conv: Subject[ConvBackend], bad: int) -> None:
    layer = make_layer(FEW, SIZES[1], conv.dtype, own=True)
    clean, clean_states = layer.on(conv, FEW)
    rows, span = rows_of(FEW)[bad], FEW[bad]
    assert layer.bias is not None
    poisoned = replace(layer, x=layer.x.clone(), weight=layer.weight.clone(), bias=layer.bias.clone())
    poisoned.x[rows] = NAN
    poisoned.weight[bad], poisoned.bias[bad] = NAN, NAN
    out, states = poisoned.on(conv, FEW)
    assert out[rows].isnan().all()
    assert states[span.slot][-1].isnan().all()
    rest = torch.ones(len(out), dtype=torch.bool)
    rest[rows] = False
    assert same_bits(out[rest], clean[rest])
    slots = sorted(set(range(NUM_SLOTS)) - written_slots([span]))
    assert same_bits(states[slots], clean_states[slots])


def test_a_poisoned_input_shows_as_long_as_it_is_seen(conv: Subject[ConvBackend]) -> None:
    spans = (StateSpan(9, slot=1, source=2),)
    layer = make_layer(spans, SIZES[0], conv.dtype)
    layer.x[3] = NAN
    out, _ = layer.on(conv, spans)
    assert out.isnan().all(1).tolist() == [False] * 3 + [True] * 4 + [False] * 2
    assert out.isnan().any(1).tolist() == [False] * 3 + [True] * 4 + [False] * 2


def test_alone_as_beside_others(conv: Subject[ConvBackend]) -> None:
    layer = make_layer(MIXED, SIZES[3], conv.dtype, own=True)
    together, states = layer.on(conv, MIXED)
    assert layer.bias is not None
    for index, (span, rows) in enumerate(zip(MIXED, rows_of(MIXED), strict=True)):
        own = slice(index, index + 1)
        alone = replace(layer, x=layer.x[rows], weight=layer.weight[own], bias=layer.bias[own])
        out, its_states = alone.on(conv, [span])
        written = sorted(written_slots([span]))
        assert same_bits(states[written], its_states[written])
        if conv.entry.same_alone:
            assert same_bits(together[rows], out)
        assert worst_excess(together[rows], out, conv.dtype) <= 1


@pytest.mark.parametrize("cuts", [(1, 2), (3, 4), (17, 18), (40, 41)])
def test_a_prompt_in_chunks_is_the_whole(conv: Subject[ConvBackend], cuts: tuple[int, int]) -> None:
    whole = (StateSpan(60, slot=1),)
    layer = make_layer(whole, SIZES[0], conv.dtype)
    wanted, end = layer.on(conv, whole)
    states, outs, source = layer.states, [], BLANK
    for start, stop in zip((0, *cuts), (*cuts, 60), strict=True):
        chunk = replace(layer, x=layer.x[start:stop], states=states)
        out, states = chunk.on(conv, [StateSpan(stop - start, slot=2, source=source)])
        outs.append(out)
        source = 2
    assert same_bits(states[2], end[1])
    assert worst_excess(torch.cat(outs), wanted, conv.dtype) <= 1


def test_small_and_large_sums(conv: Subject[ConvBackend]) -> None:
    """The sigmoid is near its value over all of its range, and finite beyond."""
    totals = torch.cat([torch.linspace(-80, 80, 161), torch.tensor([-300.0, 300.0, 1e-6, -1e-6, 0.0])])
    spans = (StateSpan(1, slot=0),)
    size = ConvSize(len(totals), 2)
    layer = replace(
        make_layer(spans, size, torch.float32, bias=False), x=torch.ones(1, size.channels), weight=totals.expand(2, -1)
    )
    layer = replace(layer, weight=layer.weight.contiguous())
    out, _ = layer.on(conv, spans)
    wanted, _ = layer.expected(spans)
    error = (out.double() - wanted).abs()
    assert (error <= 2e-5 * wanted.abs() + 1e-30).all()


def test_no_rows(conv: Subject[ConvBackend]) -> None:
    layer = make_layer((), SIZES[0], conv.dtype)
    out, states = layer.on(conv, ())
    assert out.shape == (0, SIZES[0].channels)
    assert same_bits(states, layer.states)


def test_what_does_not_fit_is_refused(conv: Subject[ConvBackend]) -> None:
    spans = STEPS["decodes"]
    layer, device = make_layer(spans, SIZES[0], conv.dtype), conv.device
    x, weight, states = layer.x.to(device), layer.weight.to(device), layer.states.to(device)
    plan = conv.backend.prepare(spans, device)
    other = torch.float32 if conv.dtype is not torch.float32 else torch.float16
    for given, kernel, slots, message in (
        (x[:3], weight, states, "x is "),
        (x.T.contiguous().T, weight, states, "rows contiguous"),
        (x, weight[:3].contiguous(), states, "weight is "),
        (x, weight.to(other), states, "weight is "),
        (x, weight, states.to(other), "states are "),
        (x, weight, states[:, :, 1:], "states are "),
        (x, weight.expand(2, -1, -1).contiguous(), states, "weight is "),
    ):
        with pytest.raises(ValueError, match=message):
            conv.backend.convolve(given, ConvWeights(kernel, None), slots, plan)
    with pytest.raises(ValueError, match="bias is "):
        conv.backend.convolve(x, ConvWeights(weight, weight[0, 1:].contiguous()), states, plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_tolerances_can_fail(dtype: torch.dtype) -> None:
    """A tap of its neighbour, a past left out and a bias dropped, each made once: all are far outside what is
    allowed."""
    layer = make_layer(MIXED, SIZES[0], dtype)
    right, _ = layer.expected(MIXED)
    assert layer.bias is not None
    wrong = (
        replace(layer, weight=layer.weight.roll(1, 0)),
        replace(layer, states=layer.states * 0),
        replace(layer, bias=None),
    )
    assert all(worst_excess(each.expected(MIXED)[0].to(dtype), right, dtype) > 10 for each in wrong)
