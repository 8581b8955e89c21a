"""What every backend of the convolution checks of its inputs; knows no layout of a plan."""

from __future__ import annotations

import torch

from loraplex_kernels.conv import ConvWeights


def check_inputs(x: torch.Tensor, weights: ConvWeights, states: torch.Tensor, step: tuple[int, int]) -> None:
    """Raise ValueError unless these fit each other and a step of ``step`` = (rows, spans)."""
    num_rows, num_spans = step
    if x.dim() != 2 or x.shape[0] != num_rows or (x.numel() and x.stride(1) != 1):
        raise ValueError(f"x is {tuple(x.shape)} with strides {x.stride()}, must be [{num_rows}, C], rows contiguous")
    channels, width = x.shape[1], states.shape[1] + 1
    shapes: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]] = {
        "weight": (weights.weight, (width, channels)),
        "bias": (weights.bias, (channels,)),
    }
    own = (num_spans,) if weights.weight.dim() == 3 else ()
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and (tuple(tensor.shape) != own + shape or not tensor.is_contiguous()):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, must be {own + shape} and contiguous")
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, x is {x.dtype}")
    if states.dim() != 3 or states.shape[2] != channels or states.dtype != x.dtype or not states.is_contiguous():
        raise ValueError(f"states are {states.dtype} {tuple(states.shape)}, must be {x.dtype} [slots, K-1, {channels}]")
