"""The gated feed-forward block: ``down(activation(gate(x)) * up(x))``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Final

import torch
from torch.nn import functional as F

from loraplex.layers.linear import Linear
from loraplex_kernels.lora import StepPlan

Activation = Callable[[torch.Tensor], torch.Tensor]

#: ``hidden_act`` of config.json -> function; names as in transformers' ``activations.py``
ACTIVATIONS: Final[Mapping[str, Activation]] = MappingProxyType(
    {
        "silu": F.silu,
        "swish": F.silu,
        "gelu": F.gelu,
        "gelu_new": partial(F.gelu, approximate="tanh"),
        "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
    }
)


class GatedMLP:
    """``[T, H]`` -> ``[T, H]``; gate and up are one packed layer, in that order."""

    __slots__ = ("_activation", "_down", "_gate_up")

    def __init__(self, gate_up: Linear, down: Linear, activation: Activation) -> None:
        self._gate_up = gate_up
        self._down = down
        self._activation = activation

    def __call__(self, x: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        gate, up = self._gate_up(x, adapters).chunk(2, dim=-1)  # [T, I] each
        return self._down(self._activation(gate).mul_(up), adapters)
