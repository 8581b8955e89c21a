"""Backends of state-space layers with single rows that a tape (``tests/fakes_graphs.py``) can capture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from loraplex_kernels.conv import ConvPlan, ConvWeights
from loraplex_kernels.conv.reference import ReferenceConv
from loraplex_kernels.ssd import SsdInputs, SsdParameters, SsdPlan
from loraplex_kernels.ssd.reference import ReferenceSsd
from loraplex_kernels.states import BLANK, StateSpan


class TapeStatePlan:
    """Of each row where its states are and go, in tensors that stay where they are; rows past the spans are padding."""

    def __init__(self, max_sequences: int) -> None:
        self.num_tokens = max_sequences
        self._slots = torch.zeros(max_sequences, dtype=torch.int64)
        self._sources = torch.zeros(max_sequences, dtype=torch.int64)
        self.real, self._begun, self.limited = torch.zeros(3, max_sequences, dtype=torch.bool).unbind(0)

    def set(self, spans: Sequence[StateSpan]) -> bool:
        if len(spans) > self.num_tokens or any(span.num_rows != 1 or span.saves for span in spans):
            return False
        for tensor in (self._slots, self._sources, self.real, self._begun, self.limited):
            tensor.zero_()
        for row, span in enumerate(spans):
            self._slots[row], self._sources[row] = span.slot, max(span.source, 0)
            self.real[row], self._begun[row] = True, span.source != BLANK
            self.limited[row] = span.num_limited == 1
        return True

    def read(self, states: torch.Tensor) -> torch.Tensor:
        """``[rows, ...]``: zeros of those that begin, and of padding."""
        return self.masked(self._begun, states[self._sources], 0.0)

    def write(self, states: torch.Tensor, new: torch.Tensor) -> None:
        """One row after the other: padding writes to slot 0 what is there."""
        for row in range(self.num_tokens):
            slot = self._slots[row : row + 1]
            kept = states.index_select(0, slot)
            states.index_copy_(0, slot, self.masked(self.real[row : row + 1], new[row : row + 1], kept))

    @staticmethod
    def masked(rows: torch.Tensor, values: torch.Tensor, others: torch.Tensor | float) -> torch.Tensor:
        """``values`` of ``rows``, ``others`` of all others."""
        return torch.where(rows.view(-1, *[1] * (values.dim() - 1)), values, others)


class TapeConv(ReferenceConv):
    """The reference backend with decodes that a tape can capture."""

    name = "tape"

    def static_plan(self, max_sequences: int, device: torch.device) -> TapeStatePlan:
        return TapeStatePlan(max_sequences)

    def convolve(self, x: torch.Tensor, weights: ConvWeights, states: torch.Tensor, plan: ConvPlan) -> torch.Tensor:
        if not isinstance(plan, TapeStatePlan):
            return super().convolve(x, weights, states, plan)
        inputs = torch.cat((plan.read(states), x.unsqueeze(1)), 1)  # [S, K, C]
        sums = (inputs * weights.weight).sum(1)
        out = functional.silu(sums if weights.bias is None else sums + weights.bias)
        plan.write(states, inputs[:, 1:])
        return plan.masked(plan.real, out, 0.0)


class TapeSsd(ReferenceSsd):
    """The reference backend with decodes that a tape can capture."""

    name = "tape"

    def static_plan(self, max_sequences: int, device: torch.device) -> TapeStatePlan:
        return TapeStatePlan(max_sequences)

    def scan(self, inputs: SsdInputs, parameters: SsdParameters, states: torch.Tensor, plan: SsdPlan) -> torch.Tensor:
        if not isinstance(plan, TapeStatePlan):
            return super().scan(inputs, parameters, states, plan)
        step = functional.softplus(inputs.dt + parameters.dt_bias)  # [S, H]
        step = plan.masked(plan.limited, step.clamp(*parameters.limits), step)
        b, c = (part.repeat_interleave(step.shape[1] // part.shape[1], 1) for part in (inputs.b, inputs.c))  # [S, H, N]
        added = torch.einsum("sh,shp,shn->shpn", step, inputs.x, b)
        state = (step * parameters.a).exp()[:, :, None, None] * plan.read(states) + added
        y = torch.einsum("shpn,shn->shp", state, c) + parameters.d[:, None] * inputs.x
        plan.write(states, state)
        return plan.masked(plan.real, y, 0.0).flatten(1)
