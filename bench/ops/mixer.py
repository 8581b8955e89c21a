"""One step of a state-space layer as tensors: what every way to convolve, scan and gate starts from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bench.ops.options import Options
from bench.ops.shapes import MixerShape, StateStep
from loraplex_kernels.conv import ConvWeights
from loraplex_kernels.ssd import GateNorm, SsdInputs, SsdParameters
from loraplex_kernels.states import StateSpan

EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Mixer:
    """Rows of the input projection, parameters, and the states of each sequence, in the slot of its number."""

    shape: MixerShape
    rows: tuple[int, ...]
    projected: torch.Tensor  # [T, z | x | B | C | dt]
    weights: ConvWeights
    parameters: SsdParameters
    norm: GateNorm
    conv_states: torch.Tensor
    ssd_states: torch.Tensor

    @property
    def spans(self) -> list[StateSpan]:
        return [StateSpan(rows, slot, source=slot) for slot, rows in enumerate(self.rows)]

    @property
    def decodes(self) -> int:
        """Sequences of one row, which are the first."""
        return sum(rows == 1 for rows in self.rows)

    @property
    def z(self) -> torch.Tensor:
        return self.projected[:, : self.shape.inner]

    @property
    def conv_input(self) -> torch.Tensor:
        return self.projected[:, self.shape.inner : self.shape.inner + self.shape.conv_dim]

    @property
    def inputs(self) -> SsdInputs:
        """As if the convolution had left its input as it was."""
        shape, count = self.shape, len(self.projected)
        wide = shape.groups * shape.state_size
        _, x, b, c, dt = self.projected.split([shape.inner, shape.inner, wide, wide, shape.heads], 1)
        return SsdInputs(
            x=x.view(count, shape.heads, shape.head_dim),
            dt=dt,
            b=b.view(count, shape.groups, shape.state_size),
            c=c.view(count, shape.groups, shape.state_size),
        )

    @property
    def conv_bytes(self) -> int:
        """Rows read and written, states read and written, weights read."""
        weights = sum(tensor.nbytes for tensor in (self.weights.weight, self.weights.bias) if tensor is not None)
        return 2 * self.conv_input.numel() * self.projected.itemsize + 2 * self.conv_states.nbytes + weights

    @property
    def scan_bytes(self) -> int:
        """Rows of x, B, C and dt read, y written, states read and written."""
        inputs = self.inputs
        numbers = 2 * inputs.x.numel() + inputs.b.numel() + inputs.c.numel() + inputs.dt.numel()
        return numbers * self.projected.itemsize + 2 * self.ssd_states.nbytes

    @property
    def gate_bytes(self) -> int:
        """y and z read, the output written, and the weight read."""
        return (3 * len(self.projected) + 1) * self.shape.inner * self.projected.itemsize

    def copied(self) -> Mixer:
        """The same numbers in other memory; parameters are shared."""
        return replace(
            self,
            projected=self.projected.clone(),
            conv_states=self.conv_states.clone(),
            ssd_states=self.ssd_states.clone(),
        )


def make_mixer(options: Options, step: StateStep) -> Mixer:
    """Random rows, states that hold something, parameters as in models."""
    shape, device, dtype = options.shapes.mixer, options.device, options.dtype
    generator = torch.Generator().manual_seed(4)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    return Mixer(
        shape=shape,
        rows=step.rows,
        projected=drawn(sum(step.rows), shape.projected).to(device, dtype),
        weights=ConvWeights(
            drawn(shape.conv_width, shape.conv_dim).to(device, dtype), drawn(shape.conv_dim).to(device, dtype)
        ),
        parameters=SsdParameters(
            a=-drawn(shape.heads).exp().to(device),
            d=drawn(shape.heads).to(device),
            dt_bias=(drawn(shape.heads) - 2).to(device),
        ),
        norm=GateNorm(drawn(shape.inner).to(device, dtype), shape.groups, EPS),
        conv_states=drawn(len(step.rows), shape.conv_width - 1, shape.conv_dim).to(device, dtype),
        ssd_states=drawn(len(step.rows), shape.heads, shape.head_dim, shape.state_size).to(device),
    )
