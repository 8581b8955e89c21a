"""Which kernels a scan and a gate launch, over which grids, with which arguments. Knows no kernel language."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from loraplex_kernels.attention.tiles import power_of_two
from loraplex_kernels.lora.device_launch import Launch, Launcher
from loraplex_kernels.ssd import GateNorm, SsdInputs, SsdParameters
from loraplex_kernels.ssd.device_plan import SsdStep, StaticSsdStep

#: elements of a state that a program of a decode, and one that passes states on, has in its registers
UPDATED: Final = 4096
PASSED: Final = 1024
#: elements of a row of a state; a tile's C and B and those under way fill what Hopper's multiprocessors have then
MAX_STATE: Final = 256
#: values of a row that a program gates where there is no norm
GATED: Final = 1024


@dataclass(frozen=True, slots=True)
class Form:
    """How chunks are cut. ``chunk``: rows of one at most; a state of each is written and read twice in between, so
    fewer rows cost memory and its traffic, more of them products. ``rows``: of a tile, within which decays are
    differences of sums; the fewer, the less is lost in them."""

    chunk: int
    rows: int
    rows_float32: int
    """Products of float32 are not for tensor cores: smaller tiles keep them in the registers."""

    def rows_of(self, dtype: torch.dtype) -> int:
        return self.rows_float32 if dtype is torch.float32 else self.rows


FORM: Final = Form(chunk=256, rows=64, rows_float32=32)


@dataclass(frozen=True, slots=True)
class KernelSet:
    """The device code, as ``ssd/triton.py`` makes it."""

    update: Any
    chunk_states: Any
    pass_states: Any
    chunk_scan: Any
    gate: Any
    interpreted: bool


@dataclass(frozen=True, slots=True)
class Scan:
    """What is scanned: a layer's inputs, parameters and states, and where y goes."""

    y: torch.Tensor
    inputs: SsdInputs
    parameters: SsdParameters
    states: torch.Tensor

    def args(self) -> tuple[object, ...]:
        """Of the kernels that read a scan's rows."""
        inputs, parameters = self.inputs, self.parameters
        tensors = (inputs.x, inputs.dt, inputs.b, inputs.c)
        own_stride = self.states.shape[1] if parameters.a.dim() == 2 else 0
        vectors = (parameters.a, parameters.d, parameters.dt_bias)
        return (*tensors, *vectors, *(tensor.stride(0) for tensor in tensors), own_stride)

    def constants(self) -> dict[str, object]:
        """Of all kernels of a scan."""
        _, heads, head_dim, size = self.states.shape
        group = heads // self.inputs.b.shape[1]
        return {"HEADS": heads, "GROUP": group, "HEAD_DIM": head_dim, "STATE": size}


class SsdKernels:
    """Launches kernels over grids that depend on a plan's sizes alone."""

    def __init__(self, kernels: KernelSet, *, form: Form = FORM, launcher: Launcher = Launch.__call__) -> None:
        self.form = form
        self.interpreted = kernels.interpreted
        self._kernels = kernels
        self._launcher = launcher

    def update(self, scan: Scan, plan: SsdStep | StaticSsdStep) -> None:
        """The spans of one row."""
        records, constants = plan.records, scan.constants()
        _, heads, head_dim, size = scan.states.shape
        block_n = power_of_two(size)
        block_p = max(1, min(power_of_two(head_dim), UPDATED // block_n))
        low, high = scan.parameters.limits
        args = (scan.y, scan.states, *scan.args(), records.table, records.saves, low, high)
        constants |= {"LIMITED": scan.parameters.are_limited, "BLOCK_P": block_p, "BLOCK_N": block_n, "num_warps": 4}
        programs = records.num_single * heads * -(-head_dim // block_p)
        self._launcher(Launch(self._kernels.update, programs, args, constants))

    def chunks(self, scan: Scan, plan: SsdStep | StaticSsdStep) -> None:
        """The spans of several rows: what each chunk adds to the state, the states between chunks, then y."""
        dtype, device = scan.y.dtype, scan.y.device
        _, heads, head_dim, size = scan.states.shape
        num_chunks, num_rows = len(plan.chunks), plan.num_tokens
        between = torch.empty((num_chunks, heads, head_dim, size), dtype=torch.float32, device=device)
        totals = torch.empty((num_chunks, heads), dtype=torch.float32, device=device)
        steps = torch.empty((2, heads, num_rows), dtype=torch.float32, device=device)
        scratch = (between, totals, steps, num_rows)
        rows = self.form.rows_of(dtype)
        block_p = min(64, max(16, power_of_two(head_dim)))
        block_n = max(16, power_of_two(size))
        tiles_p = -(-head_dim // block_p)
        tiled = scan.constants() | {"ROWS": rows, "BLOCK_P": block_p, "num_warps": 4}

        of_states = min(block_n, 128)
        low, high = scan.parameters.limits
        args = (*scratch, *scan.args(), plan.chunks, low, high)
        options = tiled | {"LIMITED": scan.parameters.are_limited, "BLOCK_N": of_states, "num_stages": 3}
        programs = num_chunks * heads * tiles_p * -(-size // of_states)
        self._launcher(Launch(self._kernels.chunk_states, programs, args, options))

        blocks = -(-head_dim * size // PASSED)
        passed: tuple[object, ...] = (between, totals, scan.states, plan.records.table, plan.chunks, plan.runs)
        options = {"HEADS": heads, "SIZE": head_dim * size, "BLOCK": PASSED, "num_warps": 4}
        self._launcher(Launch(self._kernels.pass_states, len(plan.runs) * heads * blocks, passed, options))

        args = (scan.y, *scratch, *scan.args(), plan.chunks)
        precision = "ieee" if dtype is torch.float32 else "tf32"
        tiles = -(-self.form.chunk // rows)
        options = tiled | {"TILES": tiles, "BLOCK_N": block_n, "BLOCK_K": min(block_n, 64), "PRECISION": precision}
        options |= {"num_stages": 2, "num_warps": 8 if dtype is torch.float32 else 4}
        self._launcher(Launch(self._kernels.chunk_scan, num_chunks * tiles * heads * tiles_p, args, options))

    def gate(self, out: torch.Tensor, y: torch.Tensor, z: torch.Tensor, norm: GateNorm) -> None:
        """A group of a row, or where there is no norm some of its values, for a program."""
        num_rows, size = y.shape
        weight = norm.weight
        width = GATED if weight is None else size // norm.groups
        block = power_of_two(width)
        own = weight.stride(0) if weight is not None and weight.dim() == 2 else 0
        args = (out, y, z, weight, y.stride(0), z.stride(0), own, norm.eps)
        warps = min(16, max(1, block // 512))
        options: dict[str, object] = {"SIZE": size, "WIDTH": width, "BLOCK": block, "num_warps": warps}
        options["FIRST"] = norm.norm_before_gate
        self._launcher(Launch(self._kernels.gate, num_rows * -(-size // width), args, options))
