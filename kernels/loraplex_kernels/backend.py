"""Which backends each op has and where they can run. A backend is chosen once, at start, and injected.

A new backend is one file (``lora/triton.py``) and one line of a table here. ``auto`` takes the first line that can run
on the device; what it took is the ``name`` of the backend returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import MappingProxyType
from typing import Generic, TypeVar

import torch

from loraplex_kernels.attention import AttentionBackend
from loraplex_kernels.attention.cpu import CpuAttention
from loraplex_kernels.attention.reference import ReferenceAttention
from loraplex_kernels.lora import LoraBackend
from loraplex_kernels.lora import cpu as lora_cpu
from loraplex_kernels.lora.reference import ReferenceLora

AUTO = "auto"

B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class BackendEntry(Generic[B]):
    """One line of an op's table."""

    create: Callable[[], B]
    available: Callable[[torch.device], str | None]
    """Why it cannot run on the device; None when it can."""


def _anywhere(device: torch.device) -> str | None:
    del device
    return None


def _only_cpu(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it runs on cpu tensors, the device is {device}"


def _triton_lora(*, fused: bool) -> LoraBackend:
    from loraplex_kernels.lora import triton as lora_triton

    return lora_triton.lora(fused=fused)


def _runs_triton_lora(device: torch.device) -> str | None:
    """Imports Triton, which takes a second: a line of the table that is asked for last on a CPU."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    from loraplex_kernels.lora import triton as lora_triton

    return lora_triton.available(device)


#: fastest first: the order in which ``auto`` tries them
LORA: Mapping[str, BackendEntry[LoraBackend]] = MappingProxyType(
    {
        "cpu": BackendEntry(lora_cpu.CpuLora, lora_cpu.available),
        "triton": BackendEntry(partial(_triton_lora, fused=False), _runs_triton_lora),
        "triton-fused": BackendEntry(partial(_triton_lora, fused=True), _runs_triton_lora),
        "reference": BackendEntry(ReferenceLora, _anywhere),
    }
)
ATTENTION: Mapping[str, BackendEntry[AttentionBackend]] = MappingProxyType(
    {
        "cpu": BackendEntry(CpuAttention, _only_cpu),
        "reference": BackendEntry(ReferenceAttention, _anywhere),
    }
)


def choose_lora(name: str, device: torch.device) -> LoraBackend:
    """The lora backend ``name``, or the fastest one for ``auto``. Raises ValueError when it cannot run there."""
    return _choose("lora", LORA, name, device)


def choose_attention(name: str, device: torch.device) -> AttentionBackend:
    """The attention backend ``name``, or the fastest one for ``auto``. Raises ValueError when it cannot run there."""
    return _choose("attention", ATTENTION, name, device)


def _choose(op: str, table: Mapping[str, BackendEntry[B]], name: str, device: torch.device) -> B:
    if name == AUTO:  # stops at the first line that can run: the others may be dear to ask
        return next(entry for entry in table.values() if entry.available(device) is None).create()
    reason = table[name].available(device) if name in table else "there is no such backend"
    if reason is not None:
        runnable = [known for known, entry in table.items() if entry.available(device) is None]
        raise ValueError(
            f"{op} backend {name!r} cannot run: {reason}; on {device} these can: {AUTO}, {', '.join(runnable)}"
        )
    return table[name].create()
