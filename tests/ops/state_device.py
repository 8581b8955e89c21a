"""What the device backends of the convolution and the scan are tested with in the interpreter: small tiles, poisoned
scratch memory, a record of launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch

from loraplex_kernels.conv.device import DeviceConv
from loraplex_kernels.lora.device_launch import Launch
from loraplex_kernels.ssd.device import DeviceSsd
from loraplex_kernels.ssd.device_launch import Form, SsdKernels

#: steps of some rows have several chunks, and chunks several tiles
SMALL_FORM = Form(chunk=64, rows=32, rows_float32=32)
#: what a scan's launches leave to one another, in the first one's arguments
_SCRATCH = ("between", "totals", "steps")


@dataclass
class Recorder:
    """Runs launches, and keeps them for a replay. What a scan's launches leave to one another is NaN before the
    first."""

    launches: list[Launch] = field(default_factory=list)

    def __call__(self, launch: Launch) -> None:
        self.launches.append(launch)
        self._run(launch)

    def replay(self) -> None:
        """Call every kernel again with the very arguments it had, as a captured graph does."""
        for launch in self.launches:
            self._run(launch)

    def names(self) -> list[str]:
        """What was launched."""
        return [launch.kernel.__name__.lstrip("_") for launch in self.launches]

    def _run(self, launch: Launch) -> None:
        if launch.kernel.__name__ == "_chunk_states":
            given = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
            for name in _SCRATCH:
                scratch = given[name]
                assert isinstance(scratch, torch.Tensor)
                scratch.fill_(float("nan"))
        with np.errstate(all="ignore"):  # the interpreter computes in NumPy, which warns of poison
            launch()


def make_conv(*, launcher: Callable[[Launch], None] | None = None, module: ModuleType | Any = None) -> DeviceConv:
    """A backend in the interpreter; ``module`` holds its kernels, ``conv/triton.py`` by default."""
    if module is None:
        from loraplex_kernels.conv import triton as module
    return DeviceConv("triton", module.KERNELS, launcher=launcher or Recorder())


def make_ssd(
    *, form: Form = SMALL_FORM, launcher: Callable[[Launch], None] | None = None, module: ModuleType | Any = None
) -> DeviceSsd:
    """A backend in the interpreter, on poisoned scratch; ``module`` holds its kernels, ``ssd/triton.py`` by default."""
    if module is None:
        from loraplex_kernels.ssd import triton as module
    return DeviceSsd("triton", SsdKernels(module.KERNELS, form=form, launcher=launcher or Recorder()))
