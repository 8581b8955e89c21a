"""Which kernel a call of the device op launches, over which grid, with which arguments. Knows no kernel language."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from loraplex_kernels.lora.device import Shape
from loraplex_kernels.lora.device_layout import FORMS, Forms
from loraplex_kernels.lora.device_plan import DevicePlan


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch, with all it will ever read: called again, as a captured graph does, it does the same."""

    kernel: Any
    programs: int
    args: tuple[object, ...]
    options: dict[str, object]

    def __call__(self) -> None:
        self.kernel[(self.programs,)](*self.args, **self.options)


Launcher = Callable[[Launch], None]


@dataclass(frozen=True, slots=True)
class KernelSet:
    """The device code, as ``lora/triton.py`` makes it."""

    shrink: Any
    expand: Any
    fused: Any
    scale: Any
    interpreted: bool
    """Whether the programs of a launch run one after the other, in Triton's interpreter."""


class Multiprocessors:
    """How many multiprocessors a device has, asked once."""

    def __init__(self) -> None:
        self._known: dict[torch.device, int] = {}

    def count(self, device: torch.device) -> int:
        """1 where there is no such thing."""
        if device not in self._known:
            on_gpu = device.type == "cuda"
            self._known[device] = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
        return self._known[device]


class GridKernels:
    """Launches kernels that loop over their items, over grids that depend on a plan's limits alone."""

    def __init__(
        self, kernels: KernelSet, *, fused: bool, forms: Forms = FORMS, launcher: Launcher = Launch.__call__
    ) -> None:
        self.forms = forms
        self.fused = fused
        self._kernels = kernels
        self._launcher = launcher
        self._multiprocessors = Multiprocessors()

    def add(self, y: torch.Tensor, x: torch.Tensor, plan: DevicePlan, shape: Shape) -> None:
        shrinks = plan.max_pairs * shape.splits * shape.form.max_lanes
        tables = (plan.meta, shape.root, shape.header)
        reading = (x.stride(0), shape.in_features)
        if self.fused:
            columns = (shape.columns, len(shape.columns), y.shape[1])
            items = max(shrinks, plan.max_tiles * len(shape.columns))
            constants = shrink_constants(shape) | expand_constants(shape)
            self._launch(self._kernels.fused, items, (y, x, *tables, *columns, *reading), shape, constants)
        else:
            self._launch(self._kernels.shrink, shrinks, (x, *tables, *reading), shape, shrink_constants(shape))
            self._expand(y, plan.meta, plan, shape, lookup=False)

    def add_lookup(self, y: torch.Tensor, token_ids: torch.Tensor, plan: DevicePlan, shape: Shape) -> None:
        self._expand(y, token_ids, plan, shape, lookup=True)

    def scale(self, out: torch.Tensor, x: torch.Tensor, plan: DevicePlan, shape: Shape) -> None:
        items = plan.max_visits * -(-shape.in_features // shape.form.block_n)
        args = (out, x, plan.meta, shape.root, x.stride(0), shape.in_features)
        self._launch(self._kernels.scale, items, args, shape, scale_constants(shape))

    def _expand(self, y: torch.Tensor, ids: torch.Tensor, plan: DevicePlan, shape: Shape, *, lookup: bool) -> None:
        columns = (shape.columns, len(shape.columns), y.shape[1], shape.in_features)
        args = (y, ids, plan.meta, shape.root, shape.header, *columns)
        constants = expand_constants(shape) | {"LOOKUP": lookup}
        self._launch(self._kernels.expand, plan.max_tiles * len(shape.columns), args, shape, constants)

    def _launch(
        self, kernel: Any, items: int, args: tuple[object, ...], shape: Shape, constants: dict[str, object]
    ) -> None:
        target = args[0]
        assert isinstance(target, torch.Tensor)
        per_sm, registers = shape.form.resident(target.itemsize)
        options = constants | {"num_warps": shape.form.warps, "num_stages": shape.form.stages, "maxnreg": registers}
        most = per_sm * self._multiprocessors.count(target.device)
        if self._kernels.interpreted and kernel is self._kernels.fused:
            most = 1  # none may wait for a later one
        self._launcher(Launch(kernel, max(1, min(items, most)), args, options))


def shrink_constants(shape: Shape) -> dict[str, object]:
    """The compile-time arguments of a shrink."""
    form = shape.form
    return {
        "PARTS": len(shape.part_sizes),
        "SPLITS": shape.splits,
        "CHUNK": shape.chunk,
        "BLOCK_M": form.block_m,
        "BLOCK_R": form.block_r,
        "BLOCK_K": form.block_k,
        "MAX_LANES": form.max_lanes,
    }


def expand_constants(shape: Shape) -> dict[str, object]:
    """The compile-time arguments of an expand but LOOKUP."""
    form = shape.form
    return {
        "PARTS": len(shape.part_sizes),
        "SPLITS": shape.splits,
        "BLOCK_M": form.block_m,
        "BLOCK_N": form.block_n,
        "BLOCK_C": form.block_c,
        "AHEAD": form.ahead,
        "ALIGNED": all(size % 16 == 0 for size in shape.part_sizes),
    }


def scale_constants(shape: Shape) -> dict[str, object]:
    """The compile-time arguments of a scaling of inputs."""
    return {"PARTS": len(shape.part_sizes), "BLOCK_M": shape.form.block_m, "BLOCK_N": shape.form.block_n}
