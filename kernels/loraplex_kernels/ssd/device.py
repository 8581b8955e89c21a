"""The scan of Mamba2 and its gate on a device: plans and checks around kernels that it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from loraplex_kernels.ssd import GateNorm, SsdInputs, SsdParameters, SsdPlan, StaticSsdPlan
from loraplex_kernels.ssd.device_launch import MAX_STATE, Scan, SsdKernels
from loraplex_kernels.ssd.device_plan import SsdStep, StaticSsdStep, prepare
from loraplex_kernels.ssd.shapes import check_gate, check_inputs
from loraplex_kernels.states import StateSpan


class DeviceSsd:
    """A backend for one device."""

    def __init__(self, name: str, kernels: SsdKernels) -> None:
        self.name = name
        self._kernels = kernels

    def prepare(self, spans: Sequence[StateSpan], device: torch.device) -> SsdPlan:
        return prepare(spans, device, self._kernels.form.chunk)

    def static_plan(self, max_sequences: int, device: torch.device) -> StaticSsdPlan | None:
        return StaticSsdStep(max_sequences, device)

    def scan(self, inputs: SsdInputs, parameters: SsdParameters, states: torch.Tensor, plan: SsdPlan) -> torch.Tensor:
        assert isinstance(plan, SsdStep | StaticSsdStep), "a plan of another backend"
        check_inputs(inputs, parameters, states, (plan.num_tokens, plan.records.num_spans))
        _, heads, head_dim, state_size = states.shape
        if state_size > MAX_STATE:
            raise ValueError(f"states of {state_size} elements a row: this backend takes at most {MAX_STATE}")
        y = torch.empty((plan.num_tokens, heads * head_dim), dtype=inputs.x.dtype, device=inputs.x.device)
        scan = Scan(y, inputs, parameters, states)
        if plan.records.num_single:
            self._kernels.update(scan, plan)
        if len(plan.chunks):
            self._kernels.chunks(scan, plan)
        return y

    def gate(self, y: torch.Tensor, z: torch.Tensor, norm: GateNorm) -> torch.Tensor:
        check_gate(y, z, norm)
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        if y.numel():
            weight = None if norm.weight is None else _readable(norm.weight)
            self._kernels.gate(out, _readable(y), _readable(z), replace(norm, weight=weight))
        return out


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """With the values of a row side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
