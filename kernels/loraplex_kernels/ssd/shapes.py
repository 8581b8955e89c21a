"""What every backend of the scan checks of its inputs; knows no layout of a plan."""

from __future__ import annotations

import torch

from loraplex_kernels.ssd import GateNorm, SsdInputs, SsdParameters


def check_inputs(inputs: SsdInputs, parameters: SsdParameters, states: torch.Tensor, step: tuple[int, int]) -> None:
    """Raise ValueError unless these fit each other and a step of ``step`` = (rows, spans)."""
    num_rows, num_spans = step
    if states.dim() != 4 or states.dtype is not torch.float32 or not states.is_contiguous():
        raise ValueError(f"states are {states.dtype} {tuple(states.shape)}, must be float32 [slots, H, P, N]")
    _, heads, head_dim, state_size = states.shape
    groups = inputs.b.shape[1] if inputs.b.dim() == 3 else 0
    if groups < 1 or heads % groups:
        raise ValueError(f"b is {tuple(inputs.b.shape)}, must be [{num_rows}, G, {state_size}] with G dividing {heads}")
    expected = {
        "x": (inputs.x, (num_rows, heads, head_dim)),
        "dt": (inputs.dt, (num_rows, heads)),
        "b": (inputs.b, (num_rows, groups, state_size)),
        "c": (inputs.c, (num_rows, groups, state_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, must be {shape}")
        if tensor.dtype != inputs.x.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, x is {inputs.x.dtype}")
        if num_rows and not tensor[0].is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; the values of one row must lie side by side")
    own = (num_spans, heads) if parameters.a.dim() == 2 else (heads,)
    for name, vector in (("a", parameters.a), ("d", parameters.d), ("dt_bias", parameters.dt_bias)):
        if tuple(vector.shape) != own or vector.dtype is not torch.float32 or not vector.is_contiguous():
            raise ValueError(f"{name} is {vector.dtype} {tuple(vector.shape)}, must be float32 {own} and contiguous")


def check_gate(y: torch.Tensor, z: torch.Tensor, norm: GateNorm) -> None:
    """Raise ValueError unless these fit each other."""
    if y.dim() != 2 or z.shape != y.shape or z.dtype != y.dtype or norm.groups < 1 or y.shape[1] % norm.groups:
        raise ValueError(
            f"y is {y.dtype} {tuple(y.shape)}, z is {z.dtype} {tuple(z.shape)}: must be alike, and their width a "
            f"multiple of {norm.groups} groups"
        )
    if norm.weight is not None and tuple(norm.weight.shape) not in ((y.shape[1],), tuple(y.shape)):
        raise ValueError(f"weight is {tuple(norm.weight.shape)}, must be [{y.shape[1]}] or {tuple(y.shape)}")
