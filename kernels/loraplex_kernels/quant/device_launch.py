"""Which kernel a quantized product launches, over which grid, with which arguments. Knows no kernel language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch

from loraplex_kernels.lora.device_launch import Launch, Launcher, Multiprocessors, expand_constants, shrink_constants
from loraplex_kernels.quant.device import Rows, Terms, Tiling
from loraplex_kernels.quant.device_layout import FORMS, Forms, unit_columns
from loraplex_kernels.quant.device_stack import Stack
from loraplex_kernels.quant.packing import RUN
from loraplex_kernels.quant.values import Values

_VALUES: Final[Mapping[Values, str]] = MappingProxyType(
    {Values.NF4: "table", Values.FP4: "table", Values.INT8: "int8", Values.E4M3: "e4m3"}
)
_ROUNDED: Final[Mapping[torch.dtype | None, str]] = MappingProxyType(
    {None: "", torch.float32: "", torch.float16: "fp16", torch.bfloat16: "bf16"}
)
#: rows of a matrix, and units of their codes, that a program decodes into memory
DECODED_ROWS: Final = 32
DECODED_UNITS: Final = 4


@dataclass(frozen=True, slots=True)
class KernelSet:
    """The device code, as ``quant/triton.py`` makes it."""

    product: Any
    joined: Any
    rows: Any
    interpreted: bool
    """Whether the programs of a launch run one after the other, in Triton's interpreter."""


class QuantKernels:
    """Launches kernels over grids that depend on a stack and on the rows of a step alone."""

    def __init__(self, kernels: KernelSet, *, forms: Forms = FORMS, launcher: Launcher = Launch.__call__) -> None:
        self.forms = forms
        self._kernels = kernels
        self._launcher = launcher
        self._multiprocessors = Multiprocessors()

    def product(self, rows: Rows, stack: Stack, tiling: Tiling) -> None:
        options = _options(tiling, rows.y) | _constants(stack) | _tile_constants(stack, tiling)
        self._launcher(Launch(self._kernels.product, _items(rows, tiling), _args(rows, stack, tiling), options))

    def joined(self, rows: Rows, stack: Stack, tiling: Tiling, terms: Terms) -> None:
        shape, plan = terms.shape, terms.plan
        own = expand_constants(shape) | shrink_constants(shape)
        own |= {"PLANES": own.pop("SPLITS"), "PAIR_ROWS": own.pop("BLOCK_M")}
        del own["BLOCK_N"]
        options = _options(tiling, rows.y) | _constants(stack) | own | _tile_constants(stack, tiling)
        options["num_stages"] = shape.form.stages
        args = (*_args(rows, stack, tiling), terms.x, terms.x.stride(0), plan.meta, shape.root, shape.header)
        shrinks = plan.max_pairs * shape.splits * shape.form.max_lanes
        items = max(shrinks, _items(rows, tiling), plan.max_tiles * len(tiling.columns))
        most = tiling.form.resident(rows.y.itemsize)[0] * self._multiprocessors.count(rows.y.device)
        if self._kernels.interpreted:
            most = 1  # none may wait for a later one
        self._launcher(Launch(self._kernels.joined, max(1, min(items, most)), args, options))

    def rows(self, out: torch.Tensor, indices: torch.Tensor | None, stack: Stack) -> None:
        bits = stack.scheme.values.bits
        k_tiles = -(-stack.in_features // (DECODED_UNITS * unit_columns(bits)))
        first, (g0, g1, g2, g3) = 0, stack.grids
        for part, size in enumerate(stack.part_sizes):
            if stack.scales == "nested":
                assert g1 is not None
                assert g3 is not None
                tables: tuple[torch.Tensor | None, ...] = (g0, g1[part], g2, g3[part])
            else:
                tables = stack.grids
            start = stack.start + first
            target = out if indices is not None else out[start : start + size]
            place = (start, first, size, stack.row_bytes, stack.groups, len(target), stack.in_features)
            args = (target, indices, stack.codes, stack.table, *tables, *place)
            options = _constants(stack) | {"BLOCK_N": DECODED_ROWS, "UNITS": DECODED_UNITS}
            options |= {"num_warps": 4, "enable_fp_fusion": False}
            self._launcher(Launch(self._kernels.rows, -(-len(target) // DECODED_ROWS) * k_tiles, args, options))
            first += size


def _items(rows: Rows, tiling: Tiling) -> int:
    return -(-len(rows.x) // tiling.form.block_m) * len(tiling.columns) * tiling.splits


def _args(rows: Rows, stack: Stack, tiling: Tiling) -> tuple[object, ...]:
    return (
        rows.y, rows.x, rows.bias, stack.codes, stack.table, *stack.grids, tiling.columns, tiling.planes,
        tiling.counters, len(tiling.columns), len(rows.x), rows.x.stride(0), rows.y.stride(0), stack.row_bytes,
        stack.groups, stack.in_features, tiling.chunk,
    )  # fmt: skip


def _options(tiling: Tiling, y: torch.Tensor) -> dict[str, object]:
    """How a product is compiled. Multiplies and adds stay two steps, as ``stored.decode`` has them."""
    _, registers = tiling.form.resident(y.itemsize)
    return {"num_warps": tiling.form.warps, "num_stages": 2, "maxnreg": registers, "enable_fp_fusion": False}


def _constants(stack: Stack) -> dict[str, object]:
    """The compile-time arguments that say how a stack is stored."""
    scheme = stack.scheme
    return {
        "BITS": scheme.values.bits,
        "VALUES": _VALUES.get(scheme.values, "unsigned"),
        "ZERO": scheme.zero,
        "FACTOR": scheme.factor,
        "ROUNDED": _ROUNDED[scheme.rounded],
        "GROUP": scheme.group,
        "GROUP_ROWS": scheme.group_rows,
        "SCALES": stack.scales,
    }


def _tile_constants(stack: Stack, tiling: Tiling) -> dict[str, object]:
    form = tiling.form
    return {
        "BLOCK_M": form.block_m,
        "BLOCK_N": form.block_n,
        "UNITS": form.units_of(stack.layout),
        "SPLITS": tiling.splits,
        "EVEN": stack.in_features % RUN == 0,
        "ALIGNED": all(size % 16 == 0 for size in stack.part_sizes),
    }
