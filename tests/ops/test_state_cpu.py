"""What the compiled convolution and scan promise beyond their contracts: the same bits, however work is cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from loraplex_kernels.backend import choose_conv, choose_ssd
from loraplex_kernels.conv import ConvBackend
from loraplex_kernels.ssd import GateNorm, SsdBackend
from loraplex_kernels.states import BLANK, StateSpan
from loraplex_kernels.testing import worst_excess
from tests.ops import conv_layers, ssd_layers
from tests.ops.conv_layers import ConvSize
from tests.ops.ssd_layers import EXCESS, SsdSize, expected_gate, gated
from tests.ops.state_subjects import CONV_SUBJECTS, CPU, DTYPES, SSD_SUBJECTS, STEPS, Subject, make_subject, same_bits

MIXED = STEPS["decodes and chunks"]
THREADS = (1, 2, 3, 7)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def conv() -> Subject[ConvBackend]:
    return make_subject(CONV_SUBJECTS, "cpu")


@pytest.fixture
def ssd() -> Subject[SsdBackend]:
    return make_subject(SSD_SUBJECTS, "cpu")


def test_both_are_what_auto_takes_and_run_nowhere_else() -> None:
    assert choose_conv("auto", CPU).name == choose_ssd("auto", CPU).name == "cpu"
    for choose in (choose_conv, choose_ssd):
        with pytest.raises(ValueError, match="'cpu' cannot run: it runs on cpu tensors, the device is cuda"):
            choose("cpu", torch.device("cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [701, 1792, 17])
def test_convolutions_shared_among_threads(conv: Subject[ConvBackend], channels: int, dtype: torch.dtype) -> None:
    spans = (*MIXED, StateSpan(4000 // channels * 16, slot=21, saves=((7, 22),)))
    layer = conv_layers.make_layer(spans, ConvSize(channels, 4), dtype)
    wanted, kept = layer.expected(spans)
    outs = []
    for count in THREADS:
        torch.set_num_threads(count)
        out, states = layer.on(conv, spans)
        assert same_bits(states, kept)
        outs.append(out)
    assert worst_excess(outs[0], wanted, dtype) <= 1
    assert all(same_bits(out, outs[0]) for out in outs)


@pytest.mark.parametrize("size", [SsdSize(5, 5, 31, 48), SsdSize(20, 2, 6, 40), SsdSize(3, 1, 64, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scans_shared_among_threads(ssd: Subject[SsdBackend], size: SsdSize, dtype: torch.dtype) -> None:
    layer = ssd_layers.make_layer(MIXED, size, dtype)
    wanted, _ = layer.expected(MIXED)
    found = []
    for count in (*THREADS, 200):
        torch.set_num_threads(count)
        found.append(layer.on(ssd, MIXED))
    assert worst_excess(found[0][0], wanted, dtype) <= EXCESS
    assert all(same_bits(y, found[0][0]) and same_bits(states, found[0][1]) for y, states in found)


@pytest.mark.parametrize("first", [False, True])
def test_gates_shared_among_threads(ssd: Subject[SsdBackend], first: bool) -> None:
    y, z, weight = torch.randn(3, 90, 1000, generator=torch.Generator().manual_seed(2)).unbind()
    norm = GateNorm(weight, 4, 1e-5, first)
    outs = []
    for count in THREADS:
        torch.set_num_threads(count)
        outs.append(gated(ssd, y, z, norm))
    assert worst_excess(outs[0], expected_gate(y, z, norm), torch.float32) <= 1
    assert all(same_bits(out, outs[0]) for out in outs)


@pytest.mark.parametrize("chunk", [1, 5, 16, 33])
def test_a_prompt_scanned_in_any_chunks_is_the_same_bits(ssd: Subject[SsdBackend], chunk: int) -> None:
    whole = (StateSpan(70, slot=1, num_limited=60),)
    layer = ssd_layers.make_layer(whole, SsdSize(6, 2, 5, 20), torch.bfloat16, own=True, limits=(0.1, 0.3))
    wanted, end = layer.on(ssd, whole)
    states, ys, source = layer.states, [], BLANK
    for start in range(0, 70, chunk):
        stop = min(start + chunk, 70)
        cut = replace(layer.of(0, slice(start, stop)), states=states)
        span = StateSpan(stop - start, slot=2, source=source, num_limited=max(0, min(stop, 60) - start))
        y, states = cut.on(ssd, [span])
        ys.append(y)
        source = 2
    assert same_bits(torch.cat(ys), wanted)
    assert same_bits(states[2], end[1])


def test_what_is_known_of_the_last_call_is_not_taken_for_another(
    conv: Subject[ConvBackend], ssd: Subject[SsdBackend]
) -> None:
    """One backend for layers of all kinds in turn, beside a new one for each call."""
    for own in (False, True, False):
        for limits in ((0.0, 0.2), (0.15, 0.3)):
            for size in (SsdSize(4, 2, 5, 7), SsdSize(4, 1, 5, 7), SsdSize(2, 1, 10, 7)):
                layer = ssd_layers.make_layer(MIXED, size, torch.float32, own=own, limits=limits)
                fresh = make_subject(SSD_SUBJECTS, "cpu")
                assert same_bits(layer.on(ssd, MIXED)[0], layer.on(fresh, MIXED)[0])
        for bias in (True, False):
            made = conv_layers.make_layer(MIXED, ConvSize(20, 4), torch.float32, own=own, bias=bias)
            assert same_bits(made.on(conv, MIXED)[0], made.on(make_subject(CONV_SUBJECTS, "cpu"), MIXED)[0])
    y, z, weight = torch.randn(3, 5, 24).unbind()
    for norm in (
        GateNorm(weight, 2, 1e-5),
        GateNorm(weight, 2, 0.5),
        GateNorm(weight, 3, 0.5),
        GateNorm(weight, 3, 0.5, True),
        GateNorm(weight[0], 3, 0.5, True),
        GateNorm(weight.bfloat16(), 3, 0.5, True),
        GateNorm(None, 3, 0.5, True),
    ):
        assert same_bits(gated(ssd, y, z, norm), gated(make_subject(SSD_SUBJECTS, "cpu"), y, z, norm))


def test_doubles_are_refused(conv: Subject[ConvBackend], ssd: Subject[SsdBackend]) -> None:
    with pytest.raises(ValueError, match=r"x is torch\.float64, must be one of torch\.float32"):
        conv_layers.make_layer(MIXED, ConvSize(5, 2), torch.float64).on(conv, MIXED)
    with pytest.raises(ValueError, match=r"are torch\.float64, must be one of torch\.float32"):
        ssd_layers.make_layer(MIXED, SsdSize(2, 1, 3, 4), torch.float64).on(ssd, MIXED)
