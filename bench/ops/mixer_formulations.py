"""A state-space layer in plain torch: decodes as one batch, whose states lie side by side, then prompts one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch.nn import functional as F

from bench.ops.mixer import Mixer
from loraplex_kernels.ssd import SsdInputs

#: rows of a prompt taken at a time
CHUNK = 64

#: returns out, and changes states in place
Compute = Callable[[], torch.Tensor]


def convolve(mixer: Mixer) -> Compute:
    """A sum over a window for decodes, torch's convolution for prompts."""
    x, states, decodes = mixer.conv_input, mixer.conv_states, mixer.decodes
    weight, bias = mixer.weights.weight, mixer.weights.bias
    by_channel = weight.T.unsqueeze(1).contiguous()  # [C, 1, K]

    def compute() -> torch.Tensor:
        window = torch.cat((states[:decodes], x[:decodes, None]), 1)
        outs = [F.silu((window.float() * weight.float()).sum(1) + bias).to(x.dtype)]
        states[:decodes] = window[:, 1:]
        start = decodes
        for slot, count in enumerate(mixer.rows[decodes:], decodes):
            inputs = torch.cat((states[slot], x[start : start + count]))
            outs.append(F.silu(F.conv1d(inputs.T[None], by_channel, bias, groups=x.shape[1]))[0].T)
            states[slot] = inputs[count:]
            start += count
        return torch.cat(outs)

    return compute


def scan(mixer: Mixer) -> Compute:
    """The recurrence for decodes; for prompts its chunked form, by matrix products."""
    inputs, parameters, states, decodes = mixer.inputs, mixer.parameters, mixer.ssd_states, mixer.decodes
    share = mixer.shape.heads // mixer.shape.groups

    def compute() -> torch.Tensor:
        x = inputs.x.float()
        step = F.softplus(inputs.dt.float() + parameters.dt_bias)  # [T, H]
        b, c = (tensor.float().repeat_interleave(share, 1) for tensor in (inputs.b, inputs.c))  # [T, H, N]
        stepped, decay = step[..., None] * x, step * parameters.a
        y = parameters.d[:, None] * x
        if decodes:
            first = slice(0, decodes)
            states[first] *= decay[first, :, None, None].exp()
            states[first] += stepped[first, :, :, None] * b[first, :, None]
            y[first] += (states[first] @ c[first, ..., None]).squeeze(-1)
        start = decodes
        for slot, count in enumerate(mixer.rows[decodes:], decodes):
            for begin in range(start, start + count, CHUNK):
                rows = slice(begin, min(begin + CHUNK, start + count))
                y[rows] += _chunk(SsdInputs(stepped[rows], decay[rows], b[rows], c[rows]), states[slot])
            start += count
        return y.flatten(1).to(inputs.x.dtype)

    return compute


def _chunk(rows: SsdInputs, state: torch.Tensor) -> torch.Tensor:
    """What rows of x times their steps, and the state before them, add to y; dt is the logarithm of a row's decay."""
    x, b, c = (tensor.transpose(0, 1) for tensor in (rows.x, rows.b, rows.c))  # [H, n, ...]
    sums = rows.dt.T.cumsum(1)  # [H, n]
    between = (sums[:, :, None] - sums[:, None, :]).tril().exp().tril()
    y = (c @ b.transpose(1, 2) * between) @ x + sums.exp()[..., None] * (c @ state.transpose(1, 2))
    to_end = (sums[:, -1:] - sums).exp()
    state.mul_(sums[:, -1].exp()[:, None, None]).add_((x * to_end[..., None]).transpose(1, 2) @ b)
    return y.transpose(0, 1)


def gate(mixer: Mixer) -> Compute:
    """Rows of x stand for y."""
    y, z, norm = mixer.inputs.x.flatten(1).contiguous(), mixer.z, mixer.norm

    def compute() -> torch.Tensor:
        values = (y.float() * F.silu(z.float())).view(len(y), norm.groups, -1)
        normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + norm.eps)
        return (normed.flatten(1) * norm.weight).to(y.dtype)

    return compute


FORMULATIONS: Mapping[str, Callable[[Mixer], Compute]] = MappingProxyType(
    {"conv": convolve, "scan": scan, "gate": gate}
)
