"""Feed-forward blocks: gated, ``down(activation(gate(x)) * up(x))``, and plain, ``down(activation(up(x)))``."""

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


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square_()


#: ``hidden_act`` of config.json -> function; names as in transformers' ``activations.py``
ACTIVATIONS: Final[Mapping[str, Activation]] = MappingProxyType(
    {
        "silu": F.silu,
        "swish": F.silu,
        "gelu": F.gelu,
        "gelu_new": partial(F.gelu, approximate="tanh"),
        "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
        "relu2": _squared_relu,
    }
)


class GatedMLP:
    """``[T, H]`` -> ``[T, H]``; gate and up are one packed layer, in that order."""

    __slots__ = ("_activation", "_down", "_gate_up", "_scales")

    def __init__(
        self, gate_up: Linear, down: Linear, activation: Activation, scales: tuple[float, float] = (1.0, 1.0)
    ) -> None:
        """``scales``: constants of a family, of the gate before its activation and of the output."""
        self._gate_up = gate_up
        self._down = down
        self._activation = activation
        self._scales = scales

    def __call__(self, x: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        gate, up = self._gate_up(x, adapters).chunk(2, dim=-1)  # [T, I] each
        of_gate, of_output = self._scales
        if of_gate != 1.0:
            gate = gate * of_gate
        y = self._down(self._activation(gate).mul_(up), adapters)
        return y if of_output == 1.0 else y.mul_(of_output)


class PlainMLP:
    """``[T, H]`` -> ``[T, H]``, without a gate."""

    __slots__ = ("_activation", "_down", "_up")

    def __init__(self, up: Linear, down: Linear, activation: Activation) -> None:
        self._up = up
        self._down = down
        self._activation = activation

    def __call__(self, x: torch.Tensor, adapters: StepPlan) -> torch.Tensor:
        return self._down(self._activation(self._up(x, adapters)), adapters)
