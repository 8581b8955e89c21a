"""The backends that the lora op's tests are run on, and the tables and products of one.

A backend that is slow to launch (an interpreted kernel) is tested on every pair of the matrix's values, not on every
combination of all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from loraplex_kernels.backend import choose_lora
from loraplex_kernels.lora import LoraBackend, LoraTable, PartDelta, SlotDelta
from loraplex_kernels.lora.cpu import CpuLora
from loraplex_kernels.lora.reference import ReferenceLora
from loraplex_kernels.segments import SegmentPlan
from tests.ops.lora_device import WIDE_FORMS, make_lora

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BIG = 1 << 30


@dataclass(frozen=True, slots=True)
class SubjectEntry:
    """A backend on a device."""

    create: Callable[[], LoraBackend]
    device: torch.device = CPU
    #: what this machine lacks for it; None when it can run here
    missing: Callable[[], str | None] = lambda: None
    #: launches are so dear that the matrix must be small
    slow: bool = False
    #: dtypes it is not tested in, and why
    skips: Mapping[torch.dtype, str] = field(default_factory=dict)
    marks: tuple[pytest.MarkDecorator, ...] = ()


def _no_interpreter() -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    from loraplex_kernels.lora import triton as lora_triton

    return None if lora_triton.KERNELS.interpreted else "kernels are compiled for the GPU of this machine"


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "this machine has no CUDA device"


NO_BFLOAT16 = {torch.bfloat16: "Triton's interpreter multiplies bfloat16 wrongly (tl.dot returns garbage)"}
CUDA = torch.device("cuda", 0)

SUBJECTS: Mapping[str, SubjectEntry] = {
    "reference": SubjectEntry(ReferenceLora),
    "cpu": SubjectEntry(CpuLora),
    "cpu, library alone": SubjectEntry(lambda: CpuLora(compiled=False)),
    **{
        f"{name}, interpreted": SubjectEntry(
            partial(make_lora, fused=name == "triton-fused", forms=WIDE_FORMS),
            missing=_no_interpreter,
            slow=True,
            skips=NO_BFLOAT16,
        )
        for name in ("triton", "triton-fused")
    },
    **{
        name: SubjectEntry(partial(choose_lora, name, CUDA), CUDA, missing=_no_gpu, marks=(pytest.mark.gpu,))
        for name in ("triton", "triton-fused")
    },
}


@dataclass(frozen=True, slots=True)
class Subject:
    """One backend, freshly made. Tensors go in and come out on the CPU."""

    backend: LoraBackend
    device: torch.device

    def table(
        self,
        in_features: int,
        parts: tuple[int, ...],
        dtype: torch.dtype,
        slots: Mapping[int, SlotDelta] | None = None,
        max_bytes: int = BIG,
    ) -> LoraTable:
        """A table that holds ``slots``."""
        table = self.backend.new_table(in_features, parts, dtype=dtype, device=self.device, max_bytes=max_bytes)
        for slot, delta in (slots or {}).items():
            table.write(slot, table.pack(delta))
        return table

    def fill_elsewhere(self, slots: Sequence[int]) -> LoraTable:
        """Another table of the backend, which holds these slots, so that plans may name them."""
        delta = SlotDelta((PartDelta(shift=torch.ones(1)),))
        return self.table(1, (1,), torch.float32, dict.fromkeys(slots, delta))

    def added(self, table: LoraTable, y: torch.Tensor, x: torch.Tensor, plan: SegmentPlan) -> torch.Tensor:
        """What ``add_`` makes of y."""
        result = y.to(self.device, copy=True)
        table.add_(result, x.to(self.device), self.backend.prepare(plan))
        return result.cpu()

    def looked_up(self, table: LoraTable, y: torch.Tensor, ids: torch.Tensor, plan: SegmentPlan) -> torch.Tensor:
        """What ``add_lookup_`` makes of y."""
        result = y.to(self.device, copy=True)
        table.add_lookup_(result, ids.to(self.device), self.backend.prepare(plan))
        return result.cpu()

    def scaled(self, table: LoraTable, x: torch.Tensor, plan: SegmentPlan) -> torch.Tensor:
        """What ``scale_input`` makes of x, which stays as it was."""
        given = x.to(self.device, copy=True)
        result = table.scale_input(given, self.backend.prepare(plan))
        assert torch.equal(given.cpu().nan_to_num(), x.nan_to_num())
        return result.cpu()


def make_subject(name: str) -> Subject:
    """The subject of that name; skips the test when this machine lacks something for it."""
    entry = SUBJECTS[name]
    missing = entry.missing()
    if missing is not None:
        pytest.skip(missing)
    return Subject(entry.create(), entry.device)


def every_subject() -> list[object]:
    """Parameters of the fixture ``subject``."""
    return [pytest.param(name, marks=entry.marks) for name, entry in SUBJECTS.items()]


def matrix(*axes: Sequence[object], dtypes: Sequence[torch.dtype] = DTYPES) -> list[object]:
    """Parameters of ``(subject, dtype, *axes)``, subject indirect: all combinations, or for slow subjects all pairs."""
    params: list[object] = []
    for name, entry in SUBJECTS.items():
        tested = [dtype for dtype in dtypes if dtype not in entry.skips]
        rows = pairwise(tested, *axes) if entry.slow else list(itertools.product(tested, *axes))
        params += [pytest.param(name, *row, marks=entry.marks, id=_id(name, row)) for row in rows]
        for dtype in dtypes:
            if dtype in entry.skips:
                marks = (*entry.marks, pytest.mark.skip(reason=entry.skips[dtype]))
                params.append(pytest.param(name, dtype, *(axis[0] for axis in axes), marks=marks, id=f"{name}-{dtype}"))
    return params


def pairwise(*axes: Sequence[object]) -> list[tuple[object, ...]]:
    """Few combinations that hold every pair of values of two axes; greedily, always the same ones."""
    every = list(itertools.product(*(range(len(axis)) for axis in axes)))
    left = {pair for row in every for pair in _pairs(row)}
    chosen = []
    while left:
        best = max(every, key=lambda row: len(left & _pairs(row)))
        left -= _pairs(best)
        chosen.append(tuple(axis[index] for axis, index in zip(axes, best, strict=True)))
    return chosen


def _pairs(row: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(itertools.combinations(enumerate(row), min(2, len(row))))


def _id(name: str, row: Sequence[object]) -> str:
    return "-".join([name, *(str(value) for value in row)])
