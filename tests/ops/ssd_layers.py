"""A layer's scan to run on a subject, and the right answers, row by row in float64; gates likewise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from loraplex_kernels.ssd import GateNorm, SsdBackend, SsdInputs, SsdParameters
from loraplex_kernels.states import BLANK, StateSpan
from tests.ops.state_subjects import NUM_SLOTS, Subject, apart, rows_of, same_bits

NO_LIMITS = (0.0, math.inf)
#: of what a dtype allows: in a chunk, decays are exponentials of differences of sums, whose roundings are theirs
EXCESS = 2.0


@dataclass(frozen=True, slots=True)
class SsdSize:
    heads: int
    groups: int
    head_dim: int
    state_size: int


#: one group, some, and one for each head; sizes of a model and sizes that no tile divides
SIZES = (
    SsdSize(4, 1, 16, 16),
    SsdSize(6, 2, 5, 7),
    SsdSize(3, 3, 12, 20),
    SsdSize(2, 1, 64, 128),
    SsdSize(18, 1, 3, 33),
)


@dataclass(frozen=True, slots=True)
class SsdLayer:
    """The inputs of a step, and the slots before it."""

    inputs: SsdInputs
    parameters: SsdParameters
    states: torch.Tensor

    def on(self, ssd: Subject[SsdBackend], spans: Sequence[StateSpan]) -> tuple[torch.Tensor, torch.Tensor]:
        """y and the slots after the step. Rows lie apart, with NaN between them; nothing given is changed."""
        device = ssd.device
        given = [apart(getattr(self.inputs, field.name)).to(device) for field in fields(SsdInputs)]
        before = [tensor.clone() for tensor in given]
        a, d, dt_bias = (getattr(self.parameters, name).to(device) for name in ("a", "d", "dt_bias"))
        parameters = SsdParameters(a, d, dt_bias, self.parameters.limits)
        states = self.states.clone().to(device)
        plan = ssd.backend.prepare(spans, device)
        x = self.inputs.x
        assert plan.num_tokens == len(x)
        y = ssd.backend.scan(SsdInputs(*given), parameters, states, plan)
        assert y.shape == (len(x), math.prod(x.shape[1:]))
        assert y.dtype is x.dtype
        assert y.is_contiguous()
        assert all(same_bits(now.cpu(), then.cpu()) for now, then in zip(given, before, strict=True))
        return y.cpu(), states.cpu()

    def of(self, index: int, rows: slice) -> SsdLayer:
        """That span alone, whose parameters are its own."""
        own = slice(index, index + 1)
        cut = SsdInputs(*(getattr(self.inputs, field.name)[rows] for field in fields(SsdInputs)))
        a, d, dt_bias = (getattr(self.parameters, name)[own] for name in ("a", "d", "dt_bias"))
        return SsdLayer(cut, SsdParameters(a, d, dt_bias, self.parameters.limits), self.states)

    def expected(self, spans: Sequence[StateSpan]) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``on`` must give, both in float64."""
        x, dt, b, c = (getattr(self.inputs, field.name).double() for field in fields(SsdInputs))
        share = x.shape[1] // b.shape[1]
        group = torch.arange(x.shape[1]) // share  # of each head
        y, states = torch.empty(x.shape, dtype=torch.float64), self.states.double()
        for index, (span, rows) in enumerate(zip(spans, rows_of(spans), strict=True)):
            own = self.parameters.a.dim() == 2
            a, d, dt_bias = (
                (vector[index] if own else vector).double()
                for vector in (self.parameters.a, self.parameters.d, self.parameters.dt_bias)
            )
            state = torch.zeros(states.shape[1:], dtype=torch.float64)
            if span.source != BLANK:
                state = self.states[span.source].double()
            for row in range(span.num_rows):
                at = rows.start + row
                step = torch.logaddexp(dt[at] + dt_bias, torch.zeros(1, dtype=torch.float64))  # [H]
                if row < span.num_limited:
                    low, high = self.parameters.limits
                    step = step.clamp(low, high)
                added = step[:, None, None] * x[at][:, :, None] * b[at][group][:, None, :]
                state = torch.exp(step * a)[:, None, None] * state + added
                y[at] = (state * c[at][group][:, None, :]).sum(2) + d[:, None] * x[at]
                for slot in [slot for after, slot in span.saves if after == row + 1]:
                    states[slot] = state
            states[span.slot] = state
        return y.flatten(1), states


def make_layer(
    spans: Sequence[StateSpan],
    size: SsdSize,
    dtype: torch.dtype,
    *,
    own: bool = False,
    limits: tuple[float, float] = NO_LIMITS,
) -> SsdLayer:
    """Random inputs, slots that all hold something, parameters as in models; ``own``: those of each sequence."""
    generator = torch.Generator().manual_seed(9)
    num_rows = sum(span.num_rows for span in spans)
    each = (len(spans),) if own else ()

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return SsdLayer(
        SsdInputs(
            x=drawn(num_rows, size.heads, size.head_dim).to(dtype),
            dt=drawn(num_rows, size.heads).to(dtype),
            b=drawn(num_rows, size.groups, size.state_size).to(dtype),
            c=drawn(num_rows, size.groups, size.state_size).to(dtype),
        ),
        SsdParameters(
            a=-torch.exp(drawn(*each, size.heads)),
            d=drawn(*each, size.heads),
            dt_bias=drawn(*each, size.heads) - 2,
            limits=limits,
        ),
        drawn(NUM_SLOTS, size.heads, size.head_dim, size.state_size),
    )


def gated(ssd: Subject[SsdBackend], y: torch.Tensor, z: torch.Tensor, norm: GateNorm) -> torch.Tensor:
    """What ``gate`` gives for rows of z that lie apart; nothing given is changed."""
    weight = None if norm.weight is None else norm.weight.to(ssd.device)
    given, apart_z = y.clone().to(ssd.device), apart(z).to(ssd.device)
    out = ssd.backend.gate(given, apart_z, GateNorm(weight, norm.groups, norm.eps, norm.norm_before_gate))
    assert out.shape == y.shape
    assert out.dtype is y.dtype
    assert out.is_contiguous()
    assert same_bits(given.cpu(), y)
    assert same_bits(apart_z.cpu(), z)
    return out.cpu()


def expected_gate(y: torch.Tensor, z: torch.Tensor, norm: GateNorm) -> torch.Tensor:
    """The contract's formula in float64."""
    values, gate = y.double(), z.double() * torch.sigmoid(z.double())
    if norm.weight is None:
        return values * gate
    if not norm.norm_before_gate:
        values = values * gate
    out = torch.empty_like(values)
    width = y.shape[1] // norm.groups
    for start in range(0, y.shape[1], width):
        columns = slice(start, start + width)
        mean = values[:, columns].square().mean(1, keepdim=True)
        out[:, columns] = values[:, columns] / torch.sqrt(mean + norm.eps)
    out = out * norm.weight.double()
    return out * gate if norm.norm_before_gate else out
