"""Random quantized matrices in every stored form that a format makes: what each backend of products is tried on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import torch

from loraplex_kernels.quant.packing import pack
from loraplex_kernels.quant.stored import NestedScales, PlainScales, Scales, Scheme, StoredMatrix, SuperScales
from loraplex_kernels.quant.values import Values

Make = Callable[[int, int, torch.Generator], StoredMatrix]


def _codes(rows: int, columns: int, scheme: Scheme, generator: torch.Generator) -> torch.Tensor:
    bits = scheme.values.bits
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    if scheme.values is Values.E4M3:
        codes[(codes & 127) == 127] = 0  # NaN
    return pack(codes, bits)


def _grid(rows: int, columns: int, scheme: Scheme) -> tuple[int, int]:
    return -(-rows // scheme.group_rows), scheme.groups(columns)


def _floats(grid: tuple[int, int], generator: torch.Generator, dtype: torch.dtype, size: float) -> torch.Tensor:
    return ((torch.rand(grid, generator=generator) + 0.5) * size).to(dtype)


def _plain(
    scheme: Scheme, dtype: torch.dtype, size: float, *, zeros: int = 0, shifts: bool = False, order: bool = False
) -> Make:
    def make(rows: int, columns: int, generator: torch.Generator) -> StoredMatrix:
        grid = _grid(rows, columns, scheme)
        zero = torch.randint(0, zeros, grid, generator=generator, dtype=torch.uint8) if zeros else None
        shift = -_floats(grid, generator, dtype, 8 * size) if shifts else None
        scales = PlainScales(_floats(grid, generator, dtype, size), zero, shift)
        permuted = torch.randperm(columns, generator=generator) if order else None
        return StoredMatrix(scheme, (rows, columns), _codes(rows, columns, scheme, generator), scales, permuted)

    return make


def _super(scheme: Scheme, inner: torch.dtype, *, mins: bool) -> Make:
    def make(rows: int, columns: int, generator: torch.Generator) -> StoredMatrix:
        grid, outer = _grid(rows, columns, scheme), (rows, columns // 256)
        low, high = (-128, 128) if inner is torch.int8 else (0, 64)
        integers = [torch.randint(low, high, grid, generator=generator).to(inner) for _ in range(2)]
        floats = [_floats(outer, generator, torch.float16, 1e-3) for _ in range(2)]
        scales: Scales = SuperScales(integers[0], floats[0])
        if mins:
            scales = SuperScales(integers[0], floats[0], integers[1], floats[1])
        return StoredMatrix(scheme, (rows, columns), _codes(rows, columns, scheme, generator), scales)

    return make


def _nested(scheme: Scheme) -> Make:
    def make(rows: int, columns: int, generator: torch.Generator) -> StoredMatrix:
        groups = scheme.groups(columns)
        stride, first = groups + 3, 77  # a part of a wider matrix
        codes = torch.randint(0, 256, (rows, groups), generator=generator, dtype=torch.uint8)
        table = torch.linspace(-1, 1, 256)
        outer = torch.rand((first + rows * stride) // 256 + 1, generator=generator) * 0.02
        scales = NestedScales(codes, table, outer, 0.05, first, stride)
        return StoredMatrix(scheme, (rows, columns), _codes(rows, columns, scheme, generator), scales)

    return make


#: form -> makes one of ``rows x columns``; which format stores so
FORMS: Final[Mapping[str, Make]] = MappingProxyType(
    {
        "nf4": _plain(Scheme(Values.NF4, 64), torch.float32, 0.1),  # bitsandbytes
        "nf4-nested": _nested(Scheme(Values.NF4, 64)),
        "nf4-rounded": _plain(Scheme(Values.NF4, 64, rounded=torch.bfloat16), torch.float32, 0.1),
        "fp4": _plain(Scheme(Values.FP4, 64), torch.float32, 0.1),
        # GPTQ, AWQ
        "uint4-zeros": _plain(Scheme(Values.UINT4, 128, rounded=torch.float16), torch.float16, 0.02, zeros=16),
        "uint4-order": _plain(Scheme(Values.UINT4, 32), torch.float16, 0.02, zeros=17, order=True),  # desc_act
        "uint4-row": _plain(Scheme(Values.UINT4, 0, zero=8, rounded=torch.float16), torch.float16, 0.02),
        "uint4-zero": _plain(Scheme(Values.UINT4, 32, zero=8), torch.float16, 0.02),  # Q4_0
        "uint4-shift": _plain(Scheme(Values.UINT4, 32), torch.float16, 0.02, shifts=True),  # Q4_1
        "uint4-super": _super(Scheme(Values.UINT4, 32), torch.uint8, mins=True),  # Q4_K
        "uint6-super": _super(Scheme(Values.UINT6, 16, zero=32), torch.int8, mins=False),  # Q6_K
        # GPTQ
        "uint8-zeros": _plain(Scheme(Values.UINT8, 64, rounded=torch.float16), torch.float16, 0.002, zeros=256),
        "uint8-row": _plain(Scheme(Values.UINT8, 0, zero=128, rounded=torch.float16), torch.float16, 0.002),
        "int8": _plain(Scheme(Values.INT8, 32), torch.float16, 0.002),  # Q8_0
        "int8-row": _plain(Scheme(Values.INT8, 0, factor=1 / 127), torch.float32, 0.2),  # LLM.int8
        "e4m3-row": _plain(Scheme(Values.E4M3, 0), torch.float32, 0.001),
        "e4m3-block": _plain(Scheme(Values.E4M3, 128, group_rows=128), torch.float32, 0.001),
        "e4m3-rounded": _plain(Scheme(Values.E4M3, 0, rounded=torch.bfloat16), torch.bfloat16, 0.001),
    }
)


def stored_matrix(form: str, rows: int, columns: int, seed: int = 0) -> StoredMatrix:
    """A matrix of that form; columns are a multiple of 256, or of 32 where the form has no outer scales of 256."""
    return FORMS[form](rows, columns, torch.Generator().manual_seed(seed))


def poisoned_padding(stored: StoredMatrix) -> StoredMatrix:
    """The same codes in memory whose surroundings are the largest codes: reads past the end show."""
    flat = torch.full((stored.codes.numel() + 256,), 255, dtype=torch.uint8)
    codes = flat[128 : 128 + stored.codes.numel()].view(stored.codes.shape)
    codes.copy_(stored.codes)
    return replace(stored, codes=codes)
