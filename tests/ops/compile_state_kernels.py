"""Compiles the launches of the convolution and the scan for a GPU that need not be there, and prints what came out, as
JSON.

Run as a program of its own (``test_state_compiles`` does), because Triton decides at import whether it interprets.
The launches are those of the ops themselves, recorded on CPU tensors and not run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from loraplex_kernels.conv import ConvWeights
from loraplex_kernels.conv.device import DeviceConv
from loraplex_kernels.conv.triton import KERNELS as CONV_KERNELS
from loraplex_kernels.lora.device_launch import Launch
from loraplex_kernels.ssd import GateNorm, SsdInputs, SsdParameters
from loraplex_kernels.ssd.device import DeviceSsd
from loraplex_kernels.ssd.device_launch import SsdKernels
from loraplex_kernels.ssd.triton import KERNELS as SSD_KERNELS
from loraplex_kernels.states import StateSpan
from tests.ops.compile_lora_kernels import CPU, TYPES, compiled

#: one row, and several
SPANS = (StateSpan(1, 0), StateSpan(2, 1))
NUM_ROWS = sum(span.num_rows for span in SPANS)


@dataclass(frozen=True, slots=True)
class Model:
    """A layer's sizes."""

    heads: int
    groups: int
    head_dim: int
    state_size: int
    width: int = 4


MODELS = {
    "mamba2-2.7b": Model(80, 1, 64, 128),
    "falcon-h1-34b": Model(32, 2, 128, 256),
    "odd": Model(3, 3, 5, 7, 2),
}


def launches(model: Model, dtype: torch.dtype) -> list[Launch]:
    """Every launch of a layer, inputs as the mixer has them: z, x, B, C and dt side by side."""
    found: list[Launch] = []
    inner, state = model.heads * model.head_dim, model.groups * model.state_size
    channels = inner + 2 * state
    projected = torch.zeros(NUM_ROWS, inner + channels + model.heads, dtype=dtype)
    z, convolved, dt = projected.split([inner, channels, model.heads], 1)
    conv = DeviceConv("", CONV_KERNELS, launcher=found.append)
    weights = ConvWeights(torch.zeros(model.width, channels, dtype=dtype), torch.zeros(channels, dtype=dtype))
    states = torch.zeros(2, model.width - 1, channels, dtype=dtype)
    out = conv.convolve(convolved, weights, states, conv.prepare(SPANS, CPU))
    x, b, c = out.split([inner, state, state], 1)
    ssd = DeviceSsd("", SsdKernels(SSD_KERNELS, launcher=found.append))
    by_group = (model.groups, model.state_size)
    inputs = SsdInputs(x.unflatten(1, (-1, model.head_dim)), dt, b.unflatten(1, by_group), c.unflatten(1, by_group))
    a, d, dt_bias = torch.zeros(3, model.heads).unbind(0)
    scan_states = torch.zeros(2, model.heads, model.head_dim, model.state_size)
    y = ssd.scan(inputs, SsdParameters(a, d, dt_bias), scan_states, ssd.prepare(SPANS, CPU))
    ssd.gate(y, z, GateNorm(torch.zeros(inner, dtype=dtype), model.groups, 1e-5))
    ssd.gate(y, z, GateNorm(None, 1, 1e-5))
    return found


#: (GPU, model, dtype, kernels; none: all). Tiles of float16 are those of bfloat16.
CASES: tuple[tuple[int, str, torch.dtype, tuple[str, ...]], ...] = (
    (90, "mamba2-2.7b", torch.bfloat16, ()),
    (90, "mamba2-2.7b", torch.float16, ("chunk_scan",)),
    (90, "mamba2-2.7b", torch.float32, ("chunk_scan",)),
    (80, "mamba2-2.7b", torch.bfloat16, ()),
    (90, "falcon-h1-34b", torch.bfloat16, ("chunk_scan", "update")),
    (90, "odd", torch.bfloat16, ("chunk_scan", "convolve")),
)


def records() -> Iterator[dict[str, object]]:
    """One of each kernel of each case."""
    for capability, model, dtype, kernels in CASES:
        for launch in launches(MODELS[model], dtype):
            if not kernels or launch.kernel.__name__.lstrip("_") in kernels:
                where = {"capability": capability, "dtype": TYPES[dtype], "model": model}
                yield where | {"rows": launch.options.get("ROWS")} | compiled(launch, capability)


if __name__ == "__main__":
    json.dump(list(records()), sys.stdout)
