"""The causal convolution, written to be checked by eye: one sequence at a time, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from loraplex_kernels.conv import ConvPlan, ConvWeights, StaticConvPlan
from loraplex_kernels.conv.shapes import check_inputs
from loraplex_kernels.states import BLANK, StateSpan


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """The spans as they are."""

    spans: tuple[StateSpan, ...]
    num_tokens: int


class ReferenceConv:
    """The backend every other one is compared with. Runs anywhere, fast nowhere."""

    name = "reference"

    def prepare(self, spans: Sequence[StateSpan], device: torch.device) -> ConvPlan:
        del device
        return ReferencePlan(tuple(spans), sum(span.num_rows for span in spans))

    def static_plan(self, max_sequences: int, device: torch.device) -> StaticConvPlan | None:
        del max_sequences, device
        return None

    def convolve(self, x: torch.Tensor, weights: ConvWeights, states: torch.Tensor, plan: ConvPlan) -> torch.Tensor:
        assert isinstance(plan, ReferencePlan)
        check_inputs(x, weights, states, (plan.num_tokens, len(plan.spans)))
        out = x.new_empty(x.shape)
        row, before = 0, states.shape[1]
        for index, span in enumerate(plan.spans):
            weight, bias = _of_span(weights, index)
            first = states.new_zeros(states.shape[1:]) if span.source == BLANK else states[span.source]
            inputs = torch.cat((first, x[row : row + span.num_rows]))  # [K-1 + n, C]
            sums = F.conv1d(inputs.T.float(), weight.T.unsqueeze(1).float(), bias, groups=x.shape[1])  # [C, n]
            out[row : row + span.num_rows] = F.silu(sums).T.to(x.dtype)
            for after, slot in (*span.saves, (span.num_rows, span.slot)):
                states[slot] = inputs[after : after + before]
            row += span.num_rows
        return out


def _of_span(weights: ConvWeights, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``[K, C]`` and float32 ``[C]``."""
    own = weights.weight.dim() == 3
    bias = weights.bias
    if bias is not None:
        bias = (bias[index] if own else bias).float()
    return weights.weight[index] if own else weights.weight, bias
