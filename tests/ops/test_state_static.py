"""Static plans of the convolution and the scan: one recorded set of launches serves the decodes of any later step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import pytest
import torch

from loraplex_kernels.conv import ConvWeights
from loraplex_kernels.ssd import SsdInputs, SsdParameters
from loraplex_kernels.states import StateSpan
from loraplex_kernels.testing import worst_excess
from tests.ops import conv_layers, ssd_layers
from tests.ops.state_device import Recorder, make_conv, make_ssd
from tests.ops.state_subjects import CONV_SUBJECTS, CPU, NUM_SLOTS, SSD_SUBJECTS, make_subject, same_bits, written_slots

ROWS = 4
#: decodes of one step after another
STEPS = (
    (StateSpan(1, slot=3, source=3), StateSpan(1, slot=0, num_limited=1)),
    (StateSpan(1, 5, 20), StateSpan(1, 6, 6, num_limited=1), StateSpan(1, 7, 20), StateSpan(1, 3, 3)),
    (StateSpan(1, slot=9),),
    (),
    (StateSpan(1, 1, 2), StateSpan(1, 23, 23), StateSpan(1, 4)),
)
LIMITS = (0.15, 0.3)
Tensors = dict[str, torch.Tensor]


class Op(Protocol):
    """One of the two ops, with parameters of each sequence's own."""

    def drawn(self, spans: Sequence[StateSpan]) -> tuple[Tensors, Tensors, torch.Tensor]:
        """Inputs by row, parameters by span, states before the step."""
        ...

    def called(self, backend: Any, given: Tensors, plan: Any) -> torch.Tensor:
        """What the op gives; ``given["states"]`` are changed."""
        ...

    def expected(self, spans: Sequence[StateSpan]) -> tuple[torch.Tensor, torch.Tensor]: ...


class Conv:
    size = conv_layers.SIZES[1]

    def drawn(self, spans: Sequence[StateSpan]) -> tuple[Tensors, Tensors, torch.Tensor]:
        layer = conv_layers.make_layer(spans, self.size, torch.float32, own=True)
        assert layer.bias is not None
        return {"x": layer.x}, {"weight": layer.weight, "bias": layer.bias}, layer.states

    def called(self, backend: Any, given: Tensors, plan: Any) -> torch.Tensor:
        weights = ConvWeights(given["weight"], given["bias"])
        return backend.convolve(given["x"], weights, given["states"], plan)  # type: ignore[no-any-return]

    def expected(self, spans: Sequence[StateSpan]) -> tuple[torch.Tensor, torch.Tensor]:
        return conv_layers.make_layer(spans, self.size, torch.float32, own=True).expected(spans)


class Ssd:
    size = ssd_layers.SIZES[2]

    def _layer(self, spans: Sequence[StateSpan]) -> ssd_layers.SsdLayer:
        return ssd_layers.make_layer(spans, self.size, torch.float32, own=True, limits=LIMITS)

    def drawn(self, spans: Sequence[StateSpan]) -> tuple[Tensors, Tensors, torch.Tensor]:
        layer = self._layer(spans)
        inputs = {field.name: getattr(layer.inputs, field.name) for field in fields(SsdInputs)}
        return inputs, {name: getattr(layer.parameters, name) for name in ("a", "d", "dt_bias")}, layer.states

    def called(self, backend: Any, given: Tensors, plan: Any) -> torch.Tensor:
        inputs = SsdInputs(*(given[field.name] for field in fields(SsdInputs)))
        parameters = SsdParameters(given["a"], given["d"], given["dt_bias"], LIMITS)
        return backend.scan(inputs, parameters, given["states"], plan)  # type: ignore[no-any-return]

    def expected(self, spans: Sequence[StateSpan]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._layer(spans).expected(spans)


@dataclass
class Captured:
    """An op's static plan and the tensors that a captured graph of it would name."""

    op: Op
    backend: Any
    device: torch.device = CPU

    def __post_init__(self) -> None:
        self.plan = self.backend.static_plan(ROWS, self.device)
        self.given = {name: tensor.to(self.device) for name, tensor in self._padded(()).items()}

    def _padded(self, spans: Sequence[StateSpan]) -> Tensors:
        """The tensors of a step; rows past its own, and their parameters, are NaN."""
        by_row, by_span, states = self.op.drawn(spans)
        rows = {
            name: torch.cat([tensor, tensor.new_full((ROWS - len(spans), *tensor.shape[1:]), float("nan"))])
            for name, tensor in (by_row | by_span).items()
        }
        return rows | {"states": states}

    def put(self, spans: Sequence[StateSpan]) -> None:
        """Make it the next replay's step."""
        assert self.plan.set(spans)
        for name, tensor in self._padded(spans).items():
            self.given[name].copy_(tensor)

    def call(self) -> torch.Tensor:
        return self.op.called(self.backend, self.given, self.plan)

    def check(self, out: torch.Tensor, spans: Sequence[StateSpan]) -> None:
        """What a step has given, and that nothing is left of what its padding holds."""
        wanted, kept = self.op.expected(spans)
        states = self.given["states"].cpu()
        assert worst_excess(out[: len(spans)].cpu(), wanted, torch.float32) <= 2
        assert not out[len(spans) :].any()
        written = written_slots(spans)
        if written:
            assert worst_excess(states[sorted(written)], kept[sorted(written)], torch.float32) <= 2
        others = sorted(set(range(NUM_SLOTS)) - written)
        assert same_bits(states[others], self.op.drawn(spans)[2][others])


OPS = {"conv": (Conv(), make_conv, CONV_SUBJECTS), "ssd": (Ssd(), make_ssd, SSD_SUBJECTS)}


@pytest.fixture(params=OPS)
def recorded(request: pytest.FixtureRequest) -> tuple[Captured, Recorder]:
    """In the interpreter, with a record of what is launched."""
    op, make, subjects = OPS[request.param]
    make_subject(subjects, "triton, interpreted")  # skips where it cannot run
    recorder = Recorder()
    return Captured(op, make(launcher=recorder)), recorder


def test_recorded_launches_serve_other_sequences(recorded: tuple[Captured, Recorder]) -> None:
    captured, recorder = recorded
    assert captured.plan.num_tokens == ROWS
    out = captured.call()  # fresh, all of it is padding
    captured.check(out, ())
    assert recorder.names() in (["convolve"], ["update"])
    for spans in STEPS:
        captured.put(spans)
        recorder.replay()
        captured.check(out, spans)
    captured.put(STEPS[1])
    captured.check(captured.call(), STEPS[1])
    assert len(recorder.launches) == 2
    first, later = recorder.launches
    assert first.programs == later.programs


def test_what_does_not_fit_changes_nothing(recorded: tuple[Captured, Recorder]) -> None:
    captured, _ = recorded
    captured.put(STEPS[0])
    for refused in (
        [StateSpan(1, slot) for slot in range(ROWS + 1)],  # more sequences
        [StateSpan(2, 0)],  # no single row
        [StateSpan(1, 0), StateSpan(1, 1, saves=((1, 2),))],
    ):
        assert not captured.plan.set(refused)
    captured.check(captured.call(), STEPS[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_graph_replay_is_bit_equal_to_eager(name: str) -> None:
    op, _, subjects = OPS[name]
    subject: Any = make_subject(subjects, "triton")  # type: ignore[type-var]
    captured, eager = (Captured(op, subject.backend, subject.device) for _ in range(2))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        captured.call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured.call()
    for spans in (*STEPS, *STEPS[:2]):
        captured.put(spans)
        graph.replay()
        captured.check(out, spans)
        eager.put(spans)
        by_row, by_span, states = op.drawn(spans)
        own = {key: tensor.to(subject.device) for key, tensor in (by_row | by_span | {"states": states}).items()}
        alone = op.called(subject.backend, own, subject.backend.prepare(spans, subject.device))
        assert same_bits(out[: len(spans)].cpu(), alone.cpu())
        assert same_bits(captured.given["states"].cpu(), own["states"].cpu())
        assert same_bits(eager.call().cpu(), out.cpu())
