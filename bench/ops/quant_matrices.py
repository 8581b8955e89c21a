"""Quantized matrices of random content, made where they are to be multiplied: any bytes are codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import torch

from loraplex_kernels.quant.packing import row_bytes
from loraplex_kernels.quant.stored import NestedScales, PlainScales, Scales, Scheme, StoredMatrix, SuperScales
from loraplex_kernels.quant.values import Values

#: (rows, columns, device) -> what scales are made of
MakeScales = Callable[[int, int, torch.device], Scales]


def _plain(scheme: Scheme, dtype: torch.dtype, size: float, *, zeros: bool = False) -> MakeScales:
    def make(rows: int, columns: int, device: torch.device) -> Scales:
        grid = -(-rows // scheme.group_rows), scheme.groups(columns)
        scales = ((torch.rand(grid, device=device) + 0.5) * size).to(dtype)
        return PlainScales(scales, torch.randint(0, 16, grid, device=device, dtype=torch.uint8) if zeros else None)

    return make


def _nested(rows: int, columns: int, device: torch.device) -> Scales:
    groups = columns // 64
    codes = torch.randint(0, 256, (rows, groups), device=device, dtype=torch.uint8)
    outer = torch.rand(-(-rows * groups // 256), device=device) * 0.02
    return NestedScales(codes, torch.linspace(-1, 1, 256, device=device), outer, 0.05, 0, groups)


def _super(group: int, inner: torch.dtype, *, mins: bool) -> MakeScales:
    def make(rows: int, columns: int, device: torch.device) -> Scales:
        def pair() -> tuple[torch.Tensor, torch.Tensor]:
            integers = torch.randint(0, 64, (rows, columns // group), device=device).to(inner)
            return integers, (torch.rand(rows, columns // 256, device=device) * 1e-3).half()

        scales = SuperScales(*pair())
        return SuperScales(scales.scales, scales.outer_scales, *pair()) if mins else scales

    return make


_NF4: Final = Scheme(Values.NF4, 64, rounded=torch.bfloat16)
_GPTQ: Final = Scheme(Values.UINT4, 128)
_BLOCKS: Final = Scheme(Values.E4M3, 128, group_rows=128)
_ROWS: Final = Scheme(Values.INT8, 0, factor=1 / 127)
#: name -> how codes become numbers, and scales; the first is what most people serve
STORED: Final[Mapping[str, tuple[Scheme, MakeScales]]] = MappingProxyType(
    {
        "nf4": (_NF4, _plain(_NF4, torch.float32, 0.1)),
        "nf4, double quantized": (_NF4, _nested),
        "int4, groups of 128": (_GPTQ, _plain(_GPTQ, torch.float16, 0.02, zeros=True)),
        "Q4_K": (Scheme(Values.UINT4, 32), _super(32, torch.uint8, mins=True)),
        "Q6_K": (Scheme(Values.UINT6, 16, zero=32), _super(16, torch.int8, mins=False)),
        "int8, rows": (_ROWS, _plain(_ROWS, torch.float32, 0.2)),
        "e4m3, blocks of 128": (_BLOCKS, _plain(_BLOCKS, torch.float32, 0.001)),
    }
)


def random_matrix(name: str, rows: int, columns: int, device: torch.device) -> StoredMatrix:
    """A matrix stored as ``STORED[name]`` says. Raises KeyError."""
    scheme, make_scales = STORED[name]
    bits = scheme.values.bits
    codes = torch.randint(0, 256, (rows, row_bytes(columns, bits)), device=device, dtype=torch.uint8)
    if scheme.values is Values.E4M3:
        codes &= 0xF7  # no NaN
    return StoredMatrix(scheme, (rows, columns), codes, make_scales(rows, columns, device))


def in_other_memory(stored: StoredMatrix) -> StoredMatrix:
    """The same content, so that it is not met in a cache."""
    return replace(stored, codes=stored.codes.clone(), scales=stored.scales.map(torch.clone))
