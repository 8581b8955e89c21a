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

from loraplex_kernels.attention import AttentionBackend, Target
from loraplex_kernels.attention.cpu import CpuAttention
from loraplex_kernels.attention.reference import ReferenceAttention
from loraplex_kernels.conv import ConvBackend
from loraplex_kernels.conv.cpu import CpuConv
from loraplex_kernels.conv.reference import ReferenceConv
from loraplex_kernels.lora import LoraBackend
from loraplex_kernels.lora import cpu as lora_cpu
from loraplex_kernels.lora.reference import ReferenceLora
from loraplex_kernels.merging import MergingBackend
from loraplex_kernels.merging.cpu import CpuMerging
from loraplex_kernels.merging.reference import ReferenceMerging
from loraplex_kernels.quant import QuantBackend
from loraplex_kernels.quant import cpu as quant_cpu
from loraplex_kernels.quant.reference import ReferenceQuant
from loraplex_kernels.ssd import SsdBackend
from loraplex_kernels.ssd.cpu import CpuSsd
from loraplex_kernels.ssd.reference import ReferenceSsd

AUTO = "auto"
#: every op has one of this name, which runs anywhere
REFERENCE = "reference"

#: the page size of the server's default configuration
DEFAULT_PAGE_SIZE = 16

B = TypeVar("B")
W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class BackendEntry(Generic[B, W]):
    """One line of an op's table. W says where it is to run: a device, or a device and more."""

    create: Callable[[], B]
    available: Callable[[W], str | None]
    """Why it cannot run there; None when it can."""


def _anywhere(where: object) -> str | None:
    del where
    return None


def _only_cpu(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it runs on cpu tensors, the device is {device}"


def _no_compiled(device: torch.device) -> str | None:
    reason = _only_cpu(device)
    if reason is not None:
        return reason
    if find_spec("llvmlite") is None:
        return "the package llvmlite is not installed"
    from loraplex_kernels.cpu_ir import has_vectors

    return None if has_vectors() else "this processor lacks the vectors that its kernels are written for"


# triton is imported where one of its backends is asked for, and nowhere else: a server on a CPU does without it.


def _triton_lora(*, fused: bool) -> LoraBackend:
    from loraplex_kernels.lora import triton as lora_triton

    return lora_triton.lora(fused=fused)


def _no_triton_lora(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    from loraplex_kernels.lora import triton as lora_triton

    return lora_triton.available(device)


def _triton_quant() -> QuantBackend:
    from loraplex_kernels.quant import triton as quant_triton

    return quant_triton.quant()


def _no_triton_quant(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    from loraplex_kernels.quant import triton as quant_triton

    return quant_triton.available(device)


def _triton_conv() -> ConvBackend:
    from loraplex_kernels.conv import triton as conv_triton

    return conv_triton.conv()


def _no_triton_conv(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    from loraplex_kernels.conv import triton as conv_triton

    return conv_triton.available(device)


def _triton_ssd() -> SsdBackend:
    from loraplex_kernels.ssd import triton as ssd_triton

    return ssd_triton.ssd()


def _no_triton_ssd(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    from loraplex_kernels.ssd import triton as ssd_triton

    return ssd_triton.available(device)


def _triton_attention() -> AttentionBackend:
    from loraplex_kernels.attention.triton import TritonAttention

    return TritonAttention()


def _no_triton_attention(target: Target) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    from loraplex_kernels.attention.triton import unfit

    return unfit(target.device)


def _varlen_attention() -> AttentionBackend:
    from loraplex_kernels.attention.varlen import VarlenAttention, library_kernel

    return VarlenAttention(library_kernel())


def _no_varlen_attention(target: Target) -> str | None:
    if target.device.type != "cuda":
        return f"it runs on CUDA tensors, the device is {target.device}"
    reason = _no_triton_attention(target)
    if reason is not None:
        return f"it writes keys and values by triton, and {reason}"
    from loraplex_kernels.attention import varlen

    return varlen.unfit(target)


#: fastest first: the order in which ``auto`` tries them
LORA: Mapping[str, BackendEntry[LoraBackend, torch.device]] = MappingProxyType(
    {
        "cpu": BackendEntry(lora_cpu.CpuLora, lora_cpu.available),
        "triton": BackendEntry(partial(_triton_lora, fused=False), _no_triton_lora),
        "triton-fused": BackendEntry(partial(_triton_lora, fused=True), _no_triton_lora),
        "reference": BackendEntry(ReferenceLora, _anywhere),
    }
)
ATTENTION: Mapping[str, BackendEntry[AttentionBackend, Target]] = MappingProxyType(
    {
        "cpu": BackendEntry(CpuAttention, lambda target: _only_cpu(target.device)),
        "varlen": BackendEntry(_varlen_attention, _no_varlen_attention),
        "triton": BackendEntry(_triton_attention, _no_triton_attention),
        "reference": BackendEntry(ReferenceAttention, _anywhere),
    }
)
QUANT: Mapping[str, BackendEntry[QuantBackend, torch.device]] = MappingProxyType(
    {
        "cpu": BackendEntry(quant_cpu.CpuQuant, quant_cpu.available),
        "triton": BackendEntry(_triton_quant, _no_triton_quant),
        "reference": BackendEntry(ReferenceQuant, _anywhere),
    }
)

CONV: Mapping[str, BackendEntry[ConvBackend, torch.device]] = MappingProxyType(
    {
        "cpu": BackendEntry(CpuConv, _no_compiled),
        "triton": BackendEntry(_triton_conv, _no_triton_conv),
        "reference": BackendEntry(ReferenceConv, _anywhere),
    }
)
SSD: Mapping[str, BackendEntry[SsdBackend, torch.device]] = MappingProxyType(
    {
        "cpu": BackendEntry(CpuSsd, _no_compiled),
        "triton": BackendEntry(_triton_ssd, _no_triton_ssd),
        "reference": BackendEntry(ReferenceSsd, _anywhere),
    }
)
MERGING: Mapping[str, BackendEntry[MergingBackend, torch.device]] = MappingProxyType(
    {
        "cpu": BackendEntry(CpuMerging, _no_compiled),
        "reference": BackendEntry(ReferenceMerging, _anywhere),
    }
)


def choose_lora(name: str, device: torch.device) -> LoraBackend:
    """The lora backend ``name``, or the fastest one for ``auto``. Raises ValueError when it cannot run there."""
    return _choose("lora", LORA, name, device)


def choose_attention(
    name: str,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = DEFAULT_PAGE_SIZE,
) -> AttentionBackend:
    """The attention backend ``name``, or the fastest one for ``auto``, for caches of that dtype and page size.

    Raises ValueError when it cannot run there.
    """
    return _choose("attention", ATTENTION, name, Target(device, dtype, page_size))


def choose_quant(name: str, device: torch.device) -> QuantBackend:
    """The backend of quantized products ``name``, or the fastest one for ``auto``. Raises ValueError when it cannot
    run there."""
    return _choose("quant", QUANT, name, device)


def choose_conv(name: str, device: torch.device) -> ConvBackend:
    """The backend of causal convolutions ``name``, or the fastest one for ``auto``. Raises ValueError when it cannot
    run there."""
    return _choose("conv", CONV, name, device)


def choose_ssd(name: str, device: torch.device) -> SsdBackend:
    """The backend of state-space scans ``name``, or the fastest one for ``auto``. Raises ValueError when it cannot run
    there."""
    return _choose("ssd", SSD, name, device)


def choose_merging(name: str) -> MergingBackend:
    """The backend of merged matrices ``name``, or the fastest one for ``auto``; all work on the host. Raises ValueError
    when it cannot run there."""
    return _choose("merging", MERGING, name, torch.device("cpu"))


def _choose(op: str, table: Mapping[str, BackendEntry[B, W]], name: str, device: W) -> B:
    if name == AUTO:  # stops at the first line that can run: others would import triton only to say no
        return next(entry for entry in table.values() if entry.available(device) is None).create()
    reason = table[name].available(device) if name in table else "there is no such backend"
    if reason is not None:
        runnable = [known for known, entry in table.items() if entry.available(device) is None]
        raise ValueError(
            f"{op} backend {name!r} cannot run: {reason}; on {device} these can: {AUTO}, {', '.join(runnable)}"
        )
    return table[name].create()
