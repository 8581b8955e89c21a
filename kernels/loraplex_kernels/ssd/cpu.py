"""The scan and its gate on a CPU: what calls the compiled kernels (``cpu_scan_kernel.py``, ``cpu_gate_kernel.py``).

Layers of a step are alike, and so are steps of decodes: what was found to fit is known by its dtypes, shapes and
strides, and is not looked at again while these stay the same.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from loraplex_kernels.ssd import GateNorm, SsdInputs, SsdParameters, SsdPlan, StaticSsdPlan
from loraplex_kernels.ssd.cpu_pieces import PiecePlan, plan_pieces
from loraplex_kernels.ssd.shapes import check_gate, check_inputs
from loraplex_kernels.states import StateSpan

if TYPE_CHECKING:  # imported when a kernel is needed: a server on a GPU needs no second compiler
    from loraplex_kernels.cpu_ir import Kernel

#: numbers of y, and of states times rows, that are worth a thread
_GATE_GRAIN: Final = 8192
_SCAN_GRAIN: Final = 65536


@dataclass(frozen=True, slots=True)
class _Known:
    """A call that fits. ``table`` is what the kernel reads at ``address``; ``scratch``: floats for each thread."""

    key: tuple[object, ...]
    kernel: Kernel
    table: np.ndarray
    address: int
    threads: int
    scratch: torch.Tensor


class CpuSsd:
    """The fast backend for CPU tensors. Owner of what it knows of its last calls, which come from one thread."""

    name = "cpu"

    def __init__(self, *, processor: str = "") -> None:
        """``processor``: an older one to compile for, by LLVM's name."""
        self._processor = processor
        self._scan: _Known | None = None
        self._gate: _Known | None = None

    def prepare(self, spans: Sequence[StateSpan], device: torch.device) -> SsdPlan:
        del device  # the CPU, or this backend would not have been chosen
        return plan_pieces(spans)

    def static_plan(self, max_sequences: int, device: torch.device) -> StaticSsdPlan | None:
        del max_sequences, device
        return None

    def scan(self, inputs: SsdInputs, parameters: SsdParameters, states: torch.Tensor, plan: SsdPlan) -> torch.Tensor:
        assert isinstance(plan, PiecePlan)
        x = inputs.x
        given = (x, inputs.dt, inputs.b, inputs.c, parameters.a, parameters.d, parameters.dt_bias, states)
        step = plan.num_tokens, plan.num_spans
        key = (_forms(given), parameters.limits, step, torch.get_num_threads())
        known = self._scan
        if known is None or known.key != key:
            check_inputs(inputs, parameters, states, step)
            known = self._scan = self._known_scan(key, inputs, parameters, states)
        y = x.new_empty((step[0], x.shape[1] * x.shape[2]))
        if step[0]:
            addresses = [tensor.data_ptr() for tensor in given]
            known.kernel(known.address, *addresses, y.data_ptr(), plan.address, plan.num_pieces, known.threads)
        return y

    def gate(self, y: torch.Tensor, z: torch.Tensor, norm: GateNorm) -> torch.Tensor:
        y, z = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (y, z))
        weight = norm.weight
        if weight is not None and weight.stride(-1) != 1:
            weight = weight.contiguous()
        given = (y, z) if weight is None else (y, z, weight)
        key = (_forms(given), norm.groups, norm.eps, norm.norm_before_gate, torch.get_num_threads())
        known = self._gate
        if known is None or known.key != key:
            check_gate(y, z, norm)
            known = self._gate = self._known_gate(key, y, z, norm)
        out = torch.empty(y.shape, dtype=y.dtype)
        if len(y):
            of_weight = 0 if weight is None else weight.data_ptr()
            addresses = y.data_ptr(), z.data_ptr(), of_weight, out.data_ptr(), known.scratch.data_ptr()
            known.kernel(known.address, *addresses, known.threads)
        return out

    def _known_scan(
        self, key: tuple[object, ...], inputs: SsdInputs, parameters: SsdParameters, states: torch.Tensor
    ) -> _Known:
        from loraplex_kernels.ssd.cpu_scan_kernel import LAYOUT, compile_scan

        _, heads, head_dim, state_size = states.shape
        x = inputs.x
        kernel = compile_scan(_compiled(x.dtype), state_size, self._processor)
        layout = {
            "heads": heads,
            "groups": inputs.b.shape[1],
            "head_dim": head_dim,
            **{f"{name}_stride": _row_bytes(getattr(inputs, name)) for name in ("x", "dt", "b", "c")},
            "parameter_stride": _row_bytes(parameters.a) if parameters.a.dim() == 2 else 0,
            "least": _bits(parameters.limits[0]),
            "largest": _bits(parameters.limits[1]),
        }
        threads = _threads(x.numel() * state_size, _SCAN_GRAIN)
        return _known(key, kernel, [layout[name] for name in LAYOUT], (threads, 0))

    def _known_gate(self, key: tuple[object, ...], y: torch.Tensor, z: torch.Tensor, norm: GateNorm) -> _Known:
        from loraplex_kernels.ssd.cpu_gate_kernel import LAYOUT, GateForm, compile_gate

        weight = norm.weight
        form = GateForm(_compiled(y.dtype), None if weight is None else _compiled(weight.dtype), norm.norm_before_gate)
        layout = {
            "rows": len(y),
            "groups": norm.groups,
            "width": y.shape[1] // norm.groups,
            "y_stride": _row_bytes(y),
            "z_stride": _row_bytes(z),
            "weight_stride": _row_bytes(weight) if weight is not None and weight.dim() == 2 else 0,
            "eps": _bits(norm.eps),
        }
        scratch = _threads(y.numel(), _GATE_GRAIN), layout["width"]
        return _known(key, compile_gate(form, self._processor), [layout[name] for name in LAYOUT], scratch)


def _forms(tensors: Sequence[torch.Tensor]) -> list[tuple[torch.dtype, torch.Size, tuple[int, ...]]]:
    return [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]


def _threads(numbers: int, grain: int) -> int:
    """How many a call is worth."""
    return max(1, min(torch.get_num_threads(), numbers // grain))


def _known(key: tuple[object, ...], kernel: Kernel, fields: Sequence[int], scratch: tuple[int, int]) -> _Known:
    """``scratch``: threads, and floats for each."""
    table = np.array(fields, dtype=np.int64)
    return _Known(key, kernel, table, table.ctypes.data, scratch[0], torch.empty(scratch))


def _row_bytes(tensor: torch.Tensor) -> int:
    return tensor.stride(0) * tensor.itemsize


def _bits(value: float) -> int:
    """Of a float32."""
    return int.from_bytes(struct.pack("<f", value), "little")


def _compiled(dtype: torch.dtype) -> torch.dtype:
    """The dtype, which kernels are written for. Raises ValueError for one that has none."""
    from loraplex_kernels.cpu_math import DTYPES

    if dtype not in DTYPES:
        raise ValueError(f"numbers are {dtype}, must be one of {', '.join(map(str, DTYPES))}")
    return dtype
