"""The checks of the convolution's and the scan's kernels can fail: each plausible bug, made once, turns them red."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex_kernels.ssd import GateNorm
from loraplex_kernels.ssd.device_launch import Form
from loraplex_kernels.states import StateSpan
from loraplex_kernels.testing import worst_excess
from tests.ops import conv_layers, ssd_layers
from tests.ops.lora_device import load_kernels
from tests.ops.mutants import Ward, text_of
from tests.ops.state_device import make_conv, make_ssd
from tests.ops.state_subjects import CONV_SUBJECTS, SSD_SUBJECTS, Subject

triton = pytest.importorskip("triton", reason="the package triton is not installed")

#: what it breaks -> (text of the kernels, what stands there instead)
CONV: dict[str, tuple[str, str]] = {
    "taps in the other order": ("weight_stride + tap * CHANNELS", "weight_stride + (WIDTH - 1 - tap) * CHANNELS"),
    "inputs a row late": ("row + (tap - WIDTH + 1)", "row + (tap - WIDTH)"),
    "the past of a sequence that has none": ("(at >= -BEFORE) & known", "(at >= -BEFORE)"),
    "the first span's weights": ("span.to(tl.int64) * weight_stride", "0 * weight_stride"),
    "no bias": ("if bias is not None:", "if False:"),
    "no silu": ("silu(total), 0.0)", "total, 0.0)"),
    "every tile begins at the first row": ("TILE_WORDS + 1)", "TILE_WORDS + 1) * 0"),
    "states of a row too few": ("num_rows + shift", "num_rows - 1 + shift"),
    "saves of the span's end": ("after + shift", "num_rows + shift"),
    "saves of the first span": ("saves + tl.load(record + SAVES) * SAVE", "saves"),
    "states written before they are read": (
        "    total = tl.zeros([ROWS, BLOCK], tl.float32)",
        "    tl.store(states + tl.load(record + SLOT).to(tl.int64) * size + column, 0.0, mask=ok)\n"
        "    total = tl.zeros([ROWS, BLOCK], tl.float32)",
    ),
    "padding is not zero": ("tl.where(live[:, None], silu(total), 0.0)", "silu(total)"),
    "padding writes a slot": ("mask=mask & (num_rows > 0)", "mask=mask"),
}
DECODES: dict[str, tuple[str, str]] = {
    "limits of all rows": ("step = tl.where(limited, held, step)", "step = held"),
    "no limits": ("step = tl.where(limited, held, step)", "pass"),
    "another group": ("group = head // GROUP * STATE", "group = 0"),
    "a decode's state does not decay": ("state = state * tl.exp(step * tl.load(a + own)) +", "state = state +"),
    "a decode's y of the state before": ("tl.sum(state * out_of[None, :], 1) +", "tl.sum(0.0 * state, 1) +"),
    "the past of a sequence that has none": ("mask=mask & (source >= 0)", "mask=mask"),
    "a padded row's y": ("result = tl.where(live, result, 0.0)", "result = (result + 1.0)"),
    "a padded row's state": ("(dim < HEAD_DIM) & live, (n < STATE) & live", "dim < HEAD_DIM, n < STATE"),
}  # fmt: skip
CHUNKS: dict[str, tuple[str, str]] = {
    "a softplus of small values only": ("tl.where(value > 0.0, value, 0.0) +", "0.0 +"),
    "a chunk's rows do not decay to its end": ("step * tl.exp(last - log_decay)", "step * tl.exp(0.0 * log_decay)"),
    "a chunk's tiles do not decay": ("into, added * tl.exp(last),", "into, added,"),
    "a chunk's decay is its last tile's": ("total += last", "total = last"),
    "rows past the chunk's decay": ("step = tl.where(live, _time_step", "step = tl.where(at >= 0, _time_step"),
    "another group's B": ("b + head // GROUP * STATE, row", "b, row"),
    "states of chunks do not decay": ("state = state * tl.exp(tl.load(totals + at)) +", "state = state +"),
    "a chunk begins with its own": ("tl.store(place, state, mask=ok)", "tl.store(place, added, mask=ok)"),
    "saves are not written": ("mask=ok & (save >= 0)", "mask=ok & (save > 1000)"),
    "a chunk goes on from nothing": ("known = ok & (source >= 0)", "known = ok & (source > 1000)"),
    "later rows are seen": ("(lane[:, None] >= lane[None, :])", "(lane[:, None] >= 0 * lane[None, :])"),
    "a row does not see itself": ("lane[:, None] >= lane[None, :]", "lane[:, None] > lane[None, :]"),
    "nearer tiles do not decay": ("tl.exp(decayed + last -", "tl.exp(last -"),
    "tiles between do not decay": ("decayed += last", "decayed = last"),
    "the wrong tile": ("start = (tile - 1 - back) * ROWS", "start = back * ROWS"),
    "y without d": ("inner += tl.load(d + own) * values.to(tl.float32)", "pass"),
    "the first span's parameters": ("tl.load(chunk + CHUNK_SPAN).to(tl.int64) * own_stride", "0 * own_stride"),
    "the state before a chunk in full": ("tl.exp(decayed) * product", "product"),
    "the state before a row in full": ("tl.exp(log_decay)[:, None] * (outer", "(outer"),
}
GATES: dict[str, tuple[str, str]] = {
    "a gate before its norm": ("if not FIRST:", "if FIRST:"),
    "a norm of all lanes": ("/ WIDTH + eps", "/ BLOCK + eps"),
    "a norm without eps": ("/ WIDTH + eps", "/ WIDTH"),
    "a row's weight is the first's": ("weight + row * weight_stride", "weight + 0 * row"),
}
#: a decode that saves and one from nothing, fewer rows than a kernel is wide, and rows of several tiles
CONV_SPANS = (
    StateSpan(1, slot=3, source=3, saves=((1, 4),)),
    StateSpan(1, slot=5),
    StateSpan(2, slot=6, source=6),
    StateSpan(35, slot=7, source=2, saves=((2, 8), (20, 9))),
)
SINGLE_SPANS = (StateSpan(1, slot=3, source=20, saves=((1, 4),), num_limited=1), StateSpan(1, slot=5))
#: two chunks, the first of three tiles, of a span that is not the first
CHUNK_SPANS = (StateSpan(1, slot=5), StateSpan(60, slot=7, source=2, saves=((41, 8),), num_limited=50))
PADDED = (StateSpan(1, slot=3, source=20),)
FORM = Form(chunk=48, rows=16, rows_float32=16)
SIZE = ssd_layers.SsdSize(2, 2, 5, 7)


def worst_of(layer: Any, on: Any, spans: tuple[StateSpan, ...]) -> float:
    """The worst error of a step's results and of all slots."""
    got, states = on(layer, spans)
    wanted, kept = layer.expected(spans)
    return max(worst_excess(got, wanted, torch.float32), worst_excess(states, kept, torch.float32))


class Padded:
    """A backend whose plans are static ones of two rows, the second of which is padding."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def prepare(self, spans: tuple[StateSpan, ...], device: torch.device) -> Any:
        plan = self._backend.static_plan(len(spans) + 1, device)
        assert plan.set(spans)
        return plan


def conv_excess(kernels: Path) -> float:
    """How far a file's kernels are from the formula, as a multiple of what is allowed."""
    backend = make_conv(module=load_kernels(kernels))
    subject: Any = Subject(backend, CONV_SUBJECTS["triton, interpreted"], torch.float32)
    layer = conv_layers.make_layer(CONV_SPANS, conv_layers.SIZES[1], torch.float32, own=True)
    excess = worst_of(layer, lambda layer, spans: layer.on(subject, spans), CONV_SPANS)
    padded = conv_layers.make_layer(PADDED, conv_layers.SIZES[1], torch.float32)
    given = replace(padded, x=torch.cat([padded.x, padded.x.new_ones(padded.x.shape)]))
    got, states = given.on(replace(subject, backend=Padded(backend)), PADDED)
    return max(excess, _padding(padded, got, states))


def decode_excess(kernels: Path) -> float:
    """Likewise of a scan's single rows, some of them padding."""
    subject = ssd_subject(kernels)
    excess = scan_excess(subject, SINGLE_SPANS)
    padded = ssd_layers.make_layer(PADDED, SIZE, torch.float32)
    doubled = {name: getattr(padded.inputs, name).repeat_interleave(2, 0) for name in ("x", "dt", "b", "c")}
    given = replace(padded, inputs=replace(padded.inputs, **doubled))
    got, states = given.on(replace(subject, backend=Padded(subject.backend)), PADDED)
    return max(excess, _padding(padded, got, states))


def chunk_excess(kernels: Path) -> float:
    """Likewise of a scan's chunks."""
    return scan_excess(ssd_subject(kernels), CHUNK_SPANS)


def gate_excess(kernels: Path) -> float:
    """Likewise of a gate, in both orders."""
    subject, excess = ssd_subject(kernels), 0.0
    y, z, weight = torch.randn(3, 3, 24, generator=torch.Generator().manual_seed(3)).unbind(0)
    for first in (False, True):
        norm = GateNorm(weight, 2, 0.2, first)
        gated = ssd_layers.gated(subject, y, z, norm)
        excess = max(excess, worst_excess(gated, ssd_layers.expected_gate(y, z, norm), torch.float32))
    return excess


def ssd_subject(kernels: Path) -> Any:
    """Of a file's kernels."""
    backend = make_ssd(form=FORM, module=load_kernels(kernels))
    return Subject(backend, SSD_SUBJECTS["triton, interpreted"], torch.float32)


def scan_excess(subject: Any, spans: tuple[StateSpan, ...]) -> float:
    layer = ssd_layers.make_layer(spans, SIZE, torch.float32, own=True, limits=(0.15, 0.3))
    return worst_of(layer, lambda layer, spans: layer.on(subject, spans), spans)


def _padding(layer: Any, got: torch.Tensor, states: torch.Tensor) -> float:
    """The worst error of a step of a decode and of padding, whose rows are zero and write nothing."""
    wanted, kept = layer.expected(PADDED)
    wanted = torch.cat([wanted, torch.zeros_like(wanted)])
    return max(worst_excess(got, wanted, torch.float32), worst_excess(states, kept, torch.float32))


#: part -> the op of its kernels, its mutations, and what must see them
PARTS = {
    "conv": ("conv", CONV, conv_excess),
    "decodes": ("ssd", DECODES, decode_excess),
    "chunks": ("ssd", CHUNKS, chunk_excess),
    "gates": ("ssd", GATES, gate_excess),
}


@pytest.fixture(scope="module")
def ward() -> Iterator[Ward]:
    made = Ward()
    yield made
    made.close()


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, (_, names, _) in PARTS.items() for name in names])
def test_a_mutation_is_seen(ward: Ward, part: str, name: str, tmp_path: Path) -> None:
    op, mutations, excess = PARTS[part]
    before, after = mutations[name]
    text = text_of(f"loraplex_kernels.{op}.triton")
    assert before in text, "the mutation's text is no longer in the kernels"
    (tmp_path / "triton.py").write_text(text.replace(before, after))
    assert ward.judge(excess, tmp_path / "triton.py") > 4


@pytest.mark.parametrize("part", PARTS)
def test_the_kernels_as_they_are_pass(ward: Ward, part: str, tmp_path: Path) -> None:
    op, _, excess = PARTS[part]
    (tmp_path / "triton.py").write_text(text_of(f"loraplex_kernels.{op}.triton"))
    assert ward.judge(excess, tmp_path / "triton.py") <= 2
