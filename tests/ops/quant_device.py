"""What the device backend of quantized products is tested with: small tiles, poisoned memory, a record of launches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from loraplex_kernels.lora.device_launch import Launch
from loraplex_kernels.lora.uploads import DirectQueue
from loraplex_kernels.quant.device import DeviceQuant, Rows, Stack, Terms, Tiling
from loraplex_kernels.quant.device_launch import QuantKernels
from loraplex_kernels.quant.device_layout import Form, Forms
from loraplex_kernels.quant.stored import StoredMatrix, decode
from tests.ops.lora_device import POISON, PoisonedQueue, Recorder

#: small shapes have several column tiles, K tiles and splits; the interpreter pays by the operation
SMALL_FORM = Form(
    block_m=16, block_n=32, units=4, max_splits=2, fewest_tiles=1, warps=4, programs_per_sm=3, registers=168
)
SMALL_FORMS = Forms((SMALL_FORM, replace(SMALL_FORM, block_m=32, max_splits=1)))


class CountersLeft(Exception):
    """A launch left counters that are not zero: the next one would go wrong."""


def look_at(counters: torch.Tensor) -> None:
    """Raises CountersLeft."""
    if counters.any():
        raise CountersLeft(counters.tolist())


class PoisonedKernels(QuantKernels):
    """Fills the planes with NaN before each product, and looks whether the counters are zero after it."""

    def product(self, rows: Rows, stack: Stack, tiling: Tiling) -> None:
        tiling.planes.view(torch.uint8).fill_(POISON)
        super().product(rows, stack, tiling)
        look_at(tiling.counters)

    def joined(self, rows: Rows, stack: Stack, tiling: Tiling, terms: Terms) -> None:
        tiling.planes.view(torch.uint8).fill_(POISON)
        super().joined(rows, stack, tiling, terms)
        look_at(tiling.counters)


class Launches(Recorder):
    """Runs launches and keeps them for a replay; joined ones after poisoning h."""

    def poison(self, launch: Launch) -> None:
        if launch.kernel.__name__ == "_joined":
            arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
            poison_h(arguments["header"], arguments["meta"], int(str(launch.options["PLANES"])))


def poison_h(header: Any, meta: Any, planes: int) -> None:
    """Fill what a step may use of h with NaN."""
    address, ranks, _ = header.tolist()
    ctypes.memset(address, POISON, 4 * planes * int(meta[3]) * ranks)


def make_quant(
    *,
    forms: Forms = SMALL_FORMS,
    launcher: Callable[[Launch], None] | None = None,
    queue: DirectQueue | None = None,
    module: ModuleType | Any = None,
) -> DeviceQuant:
    """A backend in the interpreter on poisoned memory; ``module`` holds its kernels, ``quant/triton.py`` by default."""
    if module is None:
        from loraplex_kernels.quant import triton as module
    kernels = PoisonedKernels(module.KERNELS, forms=forms, launcher=launcher or Launches())
    return DeviceQuant("triton", kernels, lambda device: queue or PoisonedQueue(device))


def decoded(parts: tuple[StoredMatrix, ...], dtype: torch.dtype) -> torch.Tensor:
    """The oracle's weights."""
    return torch.cat([decode(part, dtype) for part in parts])


def product(
    parts: tuple[StoredMatrix, ...], x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """``x @ W.T + bias`` in float64, of the weights in ``dtype``."""
    y = x.double() @ decoded(parts, dtype).double().T
    return y if bias is None else y + bias.double()
