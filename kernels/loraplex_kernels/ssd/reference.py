"""The scan in its short chunked form (Dao and Gu 2024, listing 1), one sequence at a time, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional as F

from loraplex_kernels.ssd import GateNorm, SsdInputs, SsdParameters, SsdPlan, StaticSsdPlan
from loraplex_kernels.ssd.shapes import check_gate, check_inputs
from loraplex_kernels.states import BLANK, StateSpan

#: rows taken at a time: bounds the matrix of decays between them
_CHUNK: Final = 64


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """The spans as they are."""

    spans: tuple[StateSpan, ...]
    num_tokens: int


class ReferenceSsd:
    """The backend every other one is compared with. Runs anywhere, fast nowhere."""

    name = "reference"

    def prepare(self, spans: Sequence[StateSpan], device: torch.device) -> SsdPlan:
        del device
        return ReferencePlan(tuple(spans), sum(span.num_rows for span in spans))

    def static_plan(self, max_sequences: int, device: torch.device) -> StaticSsdPlan | None:
        del max_sequences, device
        return None

    def scan(self, inputs: SsdInputs, parameters: SsdParameters, states: torch.Tensor, plan: SsdPlan) -> torch.Tensor:
        assert isinstance(plan, ReferencePlan)
        check_inputs(inputs, parameters, states, (plan.num_tokens, len(plan.spans)))
        y = torch.empty(inputs.x.shape, dtype=torch.float32, device=inputs.x.device)
        row = 0
        for index, span in enumerate(plan.spans):
            own = _of_span(parameters, index)
            state = torch.zeros_like(states[0]) if span.source == BLANK else states[span.source]
            saves = dict(span.saves)
            for start, stop in _pieces(span):
                rows = slice(row + start, row + stop)
                x, b, c = (tensor[rows].float() for tensor in (inputs.x, inputs.b, inputs.c))
                step = F.softplus(inputs.dt[rows].float() + own.dt_bias)  # [n, H]
                limited = torch.arange(start, stop, device=x.device)[:, None] < span.num_limited
                step = torch.where(limited, step.clamp(*own.limits), step)
                y[rows], state = _chunk(x, step, (own.a, b, c), state)
                y[rows] += own.d[:, None] * x
                if stop in saves:
                    states[saves[stop]] = state
            states[span.slot] = state
            row += span.num_rows
        return y.flatten(1).to(inputs.x.dtype)

    def gate(self, y: torch.Tensor, z: torch.Tensor, norm: GateNorm) -> torch.Tensor:
        check_gate(y, z, norm)
        gate, values = F.silu(z.float()), y.float()
        if norm.weight is None:
            return (values * gate).to(y.dtype)
        if not norm.norm_before_gate:
            values = values * gate
        by_group = values.view(len(values), norm.groups, values.shape[1] // norm.groups)
        normed = by_group * torch.rsqrt(by_group.square().mean(-1, keepdim=True) + norm.eps)
        out = normed.flatten(1) * norm.weight.float()
        return (out * gate if norm.norm_before_gate else out).to(y.dtype)


def _chunk(
    x: torch.Tensor, step: torch.Tensor, abc: tuple[torch.Tensor, torch.Tensor, torch.Tensor], state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """y ``[n, H, P]`` and the state ``[H, P, N]`` after n rows of x ``[n, H, P]`` with time steps ``[n, H]``."""
    a, b, c = abc
    heads = x.shape[1]
    b, c = (tensor.repeat_interleave(heads // tensor.shape[1], 1) for tensor in (b, c))  # [n, H, N]
    log_decay = (step * a).cumsum(0)  # [n, H]: of the state before, up to and with row i
    between = log_decay[:, None] - log_decay[None]  # [i, j, H]
    causal = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).tril()[:, :, None]
    weights = torch.where(causal, between, -torch.inf).exp() * torch.einsum("ihn,jhn->ijh", c, b)
    stepped = step[:, :, None] * x
    y = torch.einsum("ijh,jhp->ihp", weights, stepped)
    y += log_decay.exp()[:, :, None] * torch.einsum("ihn,hpn->ihp", c, state)
    to_end = (log_decay[-1] - log_decay).exp()  # [n, H]
    state = log_decay[-1].exp()[:, None, None] * state + torch.einsum("jh,jhp,jhn->hpn", to_end, stepped, b)
    return y, state


def _pieces(span: StateSpan) -> Iterator[tuple[int, int]]:
    """Its rows in runs that end where states are wanted."""
    start = 0
    for stop in (*(after for after, _ in span.saves), span.num_rows):
        while start < stop:
            end = min(start + _CHUNK, stop)
            yield start, end
            start = end


def _of_span(parameters: SsdParameters, index: int) -> SsdParameters:
    if parameters.a.dim() == 1:
        return parameters
    return SsdParameters(parameters.a[index], parameters.d[index], parameters.dt_bias[index], parameters.limits)
