"""What the device backends' tests need of a device, made of host memory: poison, delays, and a record of launches."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from loraplex_kernels.lora.device import DeviceLora
from loraplex_kernels.lora.device_launch import GridKernels, Launch
from loraplex_kernels.lora.device_layout import FORMS, Form, Forms
from loraplex_kernels.lora.uploads import Copy, DirectQueue

#: every float of these bytes is NaN
POISON = 0xFF

#: small tiles, so that small shapes have several of each: splits of K, rank tiles, column tiles, chunks of ranks
SMALL_FORM = Form(
    block_m=16,
    block_r=16,
    block_k=16,
    block_n=16,
    block_c=16,
    ahead=True,
    split_k=16,
    max_splits=3,
    max_lanes=2,
    warps=4,
    stages=2,
    programs_per_sm=3,
    registers=128,
)
SMALL_FORMS = Forms(SMALL_FORM, SMALL_FORM, SMALL_FORM)
#: large tiles, because the interpreter pays by the operation and not by the element
WIDE_FORM = replace(SMALL_FORM, ahead=False, block_r=64, block_k=64, block_n=64, block_c=64, split_k=64)
WIDE_FORMS = Forms(WIDE_FORM, replace(WIDE_FORM, block_m=32), replace(WIDE_FORM, block_m=64))


class PoisonedQueue(DirectQueue):
    """Memory is full of NaN until something is copied there."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        return super().allocate(nbytes).fill_(POISON)


@dataclass
class Recorder:
    """Runs launches, after filling the part of h that they may use with NaN, and keeps them for a replay."""

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

    def poison(self, launch: Launch) -> None:
        """Fill with NaN what the launch may use of memory that others have used."""
        if "CHUNK" in launch.options:  # it writes h
            arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
            address, ranks, _ = arguments["header"].tolist()
            cells = launch.options["SPLITS"] * int(arguments["meta"][3])
            ctypes.memset(address, POISON, 4 * cells * ranks)

    def _run(self, launch: Launch) -> None:
        self.poison(launch)
        with np.errstate(all="ignore"):  # the interpreter computes in NumPy, which warns of poison
            launch()


def make_lora(
    *,
    fused: bool,
    forms: Forms = FORMS,
    recorder: Callable[[Launch], None] | None = None,
    queue: DirectQueue | None = None,
    module: ModuleType | Any = None,
) -> DeviceLora:
    """A backend in the interpreter on poisoned memory; ``module`` holds its kernels, ``lora/triton.py`` by default."""
    if module is None:
        from loraplex_kernels.lora import triton as module
    kernels = GridKernels(module.KERNELS, fused=fused, forms=forms, launcher=recorder or Recorder())
    name = "triton-fused" if fused else "triton"
    return DeviceLora(name, kernels, lambda device: queue or PoisonedQueue(device))


def load_kernels(path: Path) -> ModuleType:
    """A copy of a file of kernels. Triton reads a kernel's source from its file, whenever it is first launched."""
    spec = importlib.util.spec_from_file_location("copied_triton", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


class DelayedCopy:
    """A copy that happens when the device is made to wait for it, or when a test says so."""

    def __init__(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._target, self._source = target, source
        self.arrived = False
        self.waited = False

    def arrive(self) -> None:
        self._target.copy_(self._source)
        self.arrived = True

    def done(self) -> bool:
        return self.arrived


class DelayedQueue(PoisonedQueue):
    """A device whose uploads take as long as a test wants."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.copies: list[DelayedCopy] = []

    def copy_beside(self, target: torch.Tensor, source: torch.Tensor) -> Copy:
        self.copies.append(DelayedCopy(target, source))
        return self.copies[-1]

    def wait(self, copy: Copy) -> None:
        assert isinstance(copy, DelayedCopy)
        copy.waited = True
        if not copy.arrived:
            copy.arrive()
