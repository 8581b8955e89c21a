"""The contracts' checks can fail: each plausible bug of the compiled kernels, made once, turns them red."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
import torch

from loraplex_kernels.ssd import GateNorm
from loraplex_kernels.testing import worst_excess
from tests.ops import conv_layers, ssd_layers
from tests.ops.conv_layers import ConvSize
from tests.ops.mutants import FATAL, Ward
from tests.ops.ssd_layers import EXCESS, SsdSize, expected_gate, gated
from tests.ops.state_subjects import STEPS, Subject, SubjectEntry, keep_only, read_slots, same_bits, written_slots

CONV, CONV_PLAN, SCAN, PIECES, GATE, MATH = (
    *("conv.cpu_kernel", "conv.cpu", "ssd.cpu_scan_kernel", "ssd.cpu_pieces", "ssd.cpu_gate_kernel", "cpu_math"),
)
#: what is loaded anew around a mutant, so that nothing else has seen it
MODULES: Final = (MATH, CONV, CONV_PLAN, PIECES, SCAN, GATE, "ssd.cpu")
SPANS = STEPS["decodes and chunks"]

#: what it breaks -> (module, its text, what stands there instead, the check that must turn red)
MUTATIONS: dict[str, tuple[str, str, str, str]] = {
    "past of another slot": (CONV, 'b.mul(span["source"],', 'b.mul(b.xor(span["source"], I64(1)),', "conv"),
    "a beginning sees slot 0": (CONV, 'blank, args["zeros"],', 'blank, args["states"],', "conv"),
    "taps reversed": (CONV, "I64(tap))", "I64(self._form.width - 1 - tap))", "conv"),
    "bias dropped": (CONV, "if self._form.has_bias:", "if False:", "conv"),
    "inputs a row late": (CONV, "I64(i - self._form.width + 1)", "I64(i - self._form.width + 2)", "conv"),
    "rows past whole tiles left out": (CONV, 'b.sub(fields["num_rows"], done))', "I64(0))", "conv"),
    "a slot keeps older inputs": (CONV, "I64(kept - self._form.width + 1)", "I64(kept - self._form.width)", "conv"),
    "weights of the first span": (CONV, 'b.mul(index, args["weight_stride"])', "I64(0)", "conv"),
    "biases of the first span": (CONV, 'b.mul(index, args["bias_stride"])', "I64(0)", "conv"),
    "one write of each span": (CONV, 'loop(b, span["num_writes"]', "loop(b, I64(1)", "conv"),
    "no activation": (CONV, "self.silu(b, total)", "total", "conv"),
    "a slot overwritten before it is saved": (
        CONV_PLAN,
        "writes += [*span.saves, (span.num_rows, span.slot)]",
        "writes += [(span.num_rows, span.slot), *span.saves]",
        "conv",
    ),
    "columns past the last whole vector left out": (MATH, 'b.icmp_unsigned("<", done, count)', "I1(0)", "conv"),
    "gate's sign": (MATH, "self.exp(b, b.fsub(self.constant(0.0), x))", "self.exp(b, x)", "conv"),
    "exponents off by one": (MATH, "[127 << 23]", "[126 << 23]", "conv"),
    "no decay": (SCAN, "b.fmul(states[place], decay)", "states[place]", "scan"),
    "d dropped": (SCAN, "b.fadd(total, b.fmul(d, x))", "total", "scan"),
    "d of the first span": (SCAN, 'd_at = b.add(b.mul(piece["span"],', "d_at = b.add(b.mul(I64(0),", "scan"),
    "a and dt_bias of the first span": (
        SCAN,
        'of_span = b.add(b.mul(piece["span"],',
        "of_span = b.add(b.mul(I64(0),",
        "scan",
    ),
    "limits for all rows": (SCAN, 'row, piece["num_limited"])', 'row, piece["num_rows"])', "scan"),
    "least step ignored": (SCAN, 'b.select(b.fcmp_ordered("<", step, least), least, step)', "step", "scan"),
    "largest step ignored": (SCAN, 'b.select(b.fcmp_ordered(">", held, largest), largest, held)', "held", "scan"),
    "B and C exchanged": (SCAN, '(("b", scratch.b), ("c", scratch.c))', '(("c", scratch.b), ("b", scratch.c))', "scan"),
    "first group for all": (SCAN, "b.mul(group, I64(self._size * self._item))", "I64(0)", "scan"),
    "steps of the first 16 heads": (SCAN, "head = b.add(begin, b.mul(tile, I64(LANES)))", "head = begin", "scan"),
    "rows past a head's last": (SCAN, "self.least(b, b.add(first, I64(r)), last)", "b.add(first, I64(r))", "scan"),
    "rows of state overlap": (SCAN, "value, there, self._mask(v), ", "value, there, None, ", "scan"),
    "a beginning sees slot 0 of states": (SCAN, "blank, scratch.zeros,", "blank, in_slot(I64(0), row),", "scan"),
    "saves left out": (SCAN, 'b.icmp_signed(">=", piece["also"], I64(0))', "ir.IntType(1)(0)", "scan"),
    "limited rows counted anew": (PIECES, "span.num_limited - start", "span.num_limited", "scan"),
    "every piece from the source": (PIECES, "source, start = span.slot, stop", "start = stop", "scan"),
    "saves where pieces end anyway": (PIECES, "{*saves, *range(", "{*range(", "scan"),
    "steps of negative numbers alone": (MATH, "b.select(positive, x, zero)", "zero", "scan"),
    "mean of another width": (GATE, 'b.uitofp(args["width"], F32)', 'b.uitofp(args["rows"], F32)', "gate"),
    "eps dropped": (GATE, "[b.fadd(mean, eps)]", "[mean]", "gate"),
    "weight of the first row": (GATE, 'args["weight_stride"], self', "I64(0), self", "gate"),
    "first group of each row": (GATE, 'b.mul(b.urem(unit, args["groups"]), args["width"])', "I64(0)", "gate"),
    "gate before the norm": (GATE, "first = self._form.norm_before_gate", "first = False", "gate"),
    "rows of z end to end": (GATE, 'args[f"{name}_stride"]', 'args["y_stride"]', "gate"),
}  # fmt: skip


def path_of(module: str) -> Path:
    spec = importlib.util.find_spec(f"loraplex_kernels.{module}")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def excess(check: str, module: str, mutant: Path) -> float:
    """How far a check is from the formula with a module's text from a file, as a multiple of what is allowed."""
    for name in MODULES:
        sys.modules.pop(f"loraplex_kernels.{name}", None)
    spec = importlib.util.spec_from_file_location(f"loraplex_kernels.{module}", mutant)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    try:
        return {"conv": _conv, "scan": _scan, "gate": _gate}[check]()
    except AssertionError:
        return FATAL


def _conv() -> float:
    backend = importlib.import_module("loraplex_kernels.conv.cpu").CpuConv
    subject = Subject(backend(), SubjectEntry(backend), torch.float32)
    layer = conv_layers.make_layer(SPANS, ConvSize(37, 4), torch.float32, own=True)
    layer = replace(layer, states=keep_only(layer.states, read_slots(SPANS)))
    out, states = layer.on(subject, SPANS)
    wanted, kept = layer.expected(SPANS)
    return worst_excess(out, wanted, torch.float32) if same_bits(states, kept) else FATAL


def _scan() -> float:
    backend = importlib.import_module("loraplex_kernels.ssd.cpu").CpuSsd
    subject = Subject(backend(), SubjectEntry(backend), torch.float32)
    worst = 0.0
    for size in (SsdSize(6, 2, 5, 7), SsdSize(18, 1, 3, 33)):
        layer = ssd_layers.make_layer(SPANS, size, torch.float32, own=True, limits=(0.15, 0.3))
        layer = replace(layer, states=keep_only(layer.states, read_slots(SPANS)))
        y, states = layer.on(subject, SPANS)
        wanted, kept = layer.expected(SPANS)
        written = sorted(written_slots(SPANS))
        found = ((y, wanted), (states[written], kept[written]))
        worst = max(worst, *(worst_excess(*pair, torch.float32) / EXCESS for pair in found))
    return worst


def _gate() -> float:
    backend = importlib.import_module("loraplex_kernels.ssd.cpu").CpuSsd
    subject = Subject(backend(), SubjectEntry(backend), torch.float32)
    y, z, weight = torch.randn(3, 5, 42, generator=torch.Generator().manual_seed(1)).unbind()
    norms = [GateNorm(weight, 2, 0.1, first) for first in (False, True)]
    return max(worst_excess(gated(subject, y, z, norm), expected_gate(y, z, norm), torch.float32) for norm in norms)


@pytest.fixture(scope="module")
def ward() -> Iterator[Ward]:
    made = Ward()
    yield made
    made.close()


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_seen(ward: Ward, name: str, tmp_path: Path) -> None:
    module, before, after, check = MUTATIONS[name]
    text = path_of(module).read_text()
    assert before in text, "the mutation's text is no longer in the kernels"
    (tmp_path / "mutant.py").write_text(text.replace(before, after))
    assert ward.judge(excess, check, module, tmp_path / "mutant.py") > 1


@pytest.mark.parametrize(("check", "module"), sorted({(check, module) for module, _, _, check in MUTATIONS.values()}))
def test_the_kernels_as_they_are_pass(ward: Ward, check: str, module: str) -> None:
    assert ward.judge(excess, check, module, path_of(module)) <= 1
