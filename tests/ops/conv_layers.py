"""A layer's convolution to run on a subject, and the right answers, row by row in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex_kernels.conv import ConvBackend, ConvWeights
from loraplex_kernels.states import BLANK, StateSpan
from tests.ops.state_subjects import NUM_SLOTS, Subject, apart, rows_of, same_bits


@dataclass(frozen=True, slots=True)
class ConvSize:
    channels: int
    width: int


SIZES = (ConvSize(48, 4), ConvSize(37, 4), ConvSize(5, 2), ConvSize(130, 3), ConvSize(19, 6))


@dataclass(frozen=True, slots=True)
class ConvLayer:
    """The inputs of a step, and the slots before it."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    states: torch.Tensor

    def on(self, conv: Subject[ConvBackend], spans: Sequence[StateSpan]) -> tuple[torch.Tensor, torch.Tensor]:
        """out and the slots after the step. Rows of x lie apart, with NaN between them; nothing given is changed."""
        device = conv.device
        x, states = apart(self.x).to(device), self.states.clone().to(device)
        before = x.clone()
        bias = None if self.bias is None else self.bias.to(device)
        plan = conv.backend.prepare(spans, device)
        assert plan.num_tokens == len(x)
        out = conv.backend.convolve(x, ConvWeights(self.weight.to(device), bias), states, plan)
        assert out.shape == x.shape
        assert out.dtype is x.dtype
        assert out.is_contiguous()
        assert same_bits(x.cpu(), before.cpu())
        return out.cpu(), states.cpu()

    def expected(self, spans: Sequence[StateSpan]) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``on`` must give: out in float64, the slots as they are kept."""
        out, states = torch.empty(self.x.shape, dtype=torch.float64), self.states.clone()
        width, channels = self.weight.shape[-2:]
        for index, (span, rows) in enumerate(zip(spans, rows_of(spans), strict=True)):
            own = self.weight.dim() == 3
            weight = (self.weight[index] if own else self.weight).double()
            bias = torch.zeros(channels) if self.bias is None else self.bias[index] if own else self.bias
            past = torch.zeros(width - 1, channels, dtype=self.x.dtype)
            if span.source != BLANK:
                past = self.states[span.source]
            inputs = torch.cat([past, self.x[rows]])
            for row in range(span.num_rows):
                total = bias.double()
                for tap in range(width):
                    total = total + weight[tap] * inputs[row + tap].double()
                out[rows.start + row] = total / (1 + torch.exp(-total))
                for slot in [slot for after, slot in span.saves if after == row + 1]:
                    states[slot] = inputs[row + 1 : row + width]
            states[span.slot] = inputs[span.num_rows :]
        return out, states


def make_layer(
    spans: Sequence[StateSpan], size: ConvSize, dtype: torch.dtype, *, bias: bool = True, own: bool = False
) -> ConvLayer:
    """Random inputs, and slots that all hold something; ``own``: weights of each sequence."""
    generator = torch.Generator().manual_seed(5)
    each = (len(spans),) if own else ()

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return ConvLayer(
        x=drawn(sum(span.num_rows for span in spans), size.channels),
        weight=drawn(*each, size.width, size.channels),
        bias=drawn(*each, size.channels) if bias else None,
        states=drawn(NUM_SLOTS, size.width - 1, size.channels),
    )
