"""The causal convolution on a CPU: what calls the compiled kernel (``cpu_kernel.py``).

Layers of a step are alike, and so are steps of decodes: what was found to fit is known by its dtypes, shapes and
strides, and is not looked at again while these stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from loraplex_kernels.conv import ConvPlan, ConvWeights, StaticConvPlan
from loraplex_kernels.conv.shapes import check_inputs
from loraplex_kernels.states import StateSpan

if TYPE_CHECKING:  # imported when a kernel is needed: a server on a GPU needs no second compiler
    from loraplex_kernels.cpu_ir import Kernel

#: numbers of x that are worth a thread
_GRAIN: Final = 8192


@dataclass(frozen=True, slots=True)
class CpuConvPlan:
    """A step's spans and what they write, as the kernel reads them: ``spans`` at the first address, ``writes`` at the
    second."""

    spans: np.ndarray
    writes: np.ndarray
    addresses: tuple[int, int]
    num_tokens: int
    num_spans: int


@dataclass(frozen=True, slots=True)
class _Known:
    """A call that fits. ``table`` is what the kernel reads at ``address``; ``zeros`` are the inputs before a beginning,
    of one row."""

    key: tuple[object, ...]
    kernel: Kernel
    table: np.ndarray
    address: int
    zeros: torch.Tensor
    threads: int


class CpuConv:
    """The fast backend for CPU tensors. Owner of what it knows of its last call; calls come from one thread."""

    name = "cpu"

    def __init__(self, *, processor: str = "") -> None:
        """``processor``: an older one to compile for, by LLVM's name."""
        self._processor = processor
        self._last: _Known | None = None

    def prepare(self, spans: Sequence[StateSpan], device: torch.device) -> ConvPlan:
        del device  # the CPU, or this backend would not have been chosen
        found: list[tuple[int, ...]] = []
        writes: list[tuple[int, int]] = []
        row = 0
        for span in spans:
            found.append((row, span.num_rows, span.source, len(writes), len(span.saves) + 1))
            writes += [*span.saves, (span.num_rows, span.slot)]  # its own last: what it held is read for saves
            row += span.num_rows
        table, write_table = (np.array(rows, dtype=np.int64) for rows in (found, writes))
        return CpuConvPlan(table, write_table, (table.ctypes.data, write_table.ctypes.data), row, len(found))

    def static_plan(self, max_sequences: int, device: torch.device) -> StaticConvPlan | None:
        del max_sequences, device
        return None

    def convolve(self, x: torch.Tensor, weights: ConvWeights, states: torch.Tensor, plan: ConvPlan) -> torch.Tensor:
        assert isinstance(plan, CpuConvPlan)
        weight, bias = weights.weight, weights.bias
        given = (x, weight, states) if bias is None else (x, weight, states, bias)
        step = plan.num_tokens, plan.num_spans
        forms = [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in given]
        key = (forms, step, torch.get_num_threads())
        known = self._last
        if known is None or known.key != key:
            check_inputs(x, weights, states, step)
            known = self._last = self._fit(key, x, weights, states)
        out = x.new_empty(x.shape)
        if step[0]:
            spans, writes = plan.addresses
            known.kernel(
                known.address,
                x.data_ptr(),
                weight.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                states.data_ptr(),
                known.zeros.data_ptr(),
                out.data_ptr(),
                spans,
                step[1],
                writes,
                known.threads,
            )
        return out

    def _fit(self, key: tuple[object, ...], x: torch.Tensor, weights: ConvWeights, states: torch.Tensor) -> _Known:
        from loraplex_kernels.conv.cpu_kernel import LAYOUT, ConvForm, compile_conv
        from loraplex_kernels.cpu_math import DTYPES

        if x.dtype not in DTYPES:
            raise ValueError(f"x is {x.dtype}, must be one of {', '.join(map(str, DTYPES))}")
        weight, bias = weights.weight, weights.bias
        own = weight.dim() == 3
        layout = {
            "channels": x.shape[1],
            "x_stride": x.stride(0) * x.itemsize,
            "weight_stride": weight.stride(0) * x.itemsize if own else 0,
            "bias_stride": x.shape[1] * x.itemsize if own and bias is not None else 0,
        }
        table = np.array([layout[name] for name in LAYOUT], dtype=np.int64)
        kernel = compile_conv(ConvForm(x.dtype, states.shape[1] + 1, bias is not None), self._processor)
        threads = max(1, min(torch.get_num_threads(), x.numel() // _GRAIN))
        return _Known(key, kernel, table, table.ctypes.data, x.new_zeros(x.shape[1]), threads)
