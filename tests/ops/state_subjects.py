"""The backends that tests of the convolution and the scan are run on, and the steps that these run.

A backend that is slow to launch or to compile is tested on every pair of a matrix's values, not on every combination of
all of them, and one that is interpreted on every value.
"""

from __future__ import annotations

import itertools
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import pytest
import torch

from loraplex_kernels.backend import choose_conv, choose_ssd
from loraplex_kernels.conv import ConvBackend
from loraplex_kernels.conv.cpu import CpuConv
from loraplex_kernels.conv.reference import ReferenceConv
from loraplex_kernels.ssd import SsdBackend
from loraplex_kernels.ssd.cpu import CpuSsd
from loraplex_kernels.ssd.reference import ReferenceSsd
from loraplex_kernels.states import BLANK, StateSpan
from tests.ops.attention_subjects import CUDA, no_gpu, no_interpreter
from tests.ops.lora_subjects import pairwise

B = TypeVar("B")

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ON_X86 = platform.machine() == "x86_64"
NUM_SLOTS = 24


@dataclass(frozen=True, slots=True)
class SubjectEntry(Generic[B]):
    """A backend on a device."""

    create: Callable[[], B]
    device: torch.device = CPU
    #: what this machine lacks for it; None when it can run here
    missing: Callable[[], str | None] = lambda: None
    #: launches, or compilations, are so dear that the matrix must be small
    slow: bool = False
    #: and here that it must be as small as can be
    interpreted: bool = False
    #: dtypes it is not tested in, and why
    skips: Mapping[torch.dtype, str] = field(default_factory=dict)
    #: whether a span's results are the same bits whatever else is in the step
    same_alone: bool = True
    marks: tuple[pytest.MarkDecorator, ...] = ()


def _interpreted_ssd() -> SsdBackend:
    from tests.ops.state_device import make_ssd

    return make_ssd()


_BY_TRITON: Any = {"missing": no_interpreter, "interpreted": True}
_ON_GPU: Any = {"device": CUDA, "missing": no_gpu, "slow": True, "marks": (pytest.mark.gpu,)}
CONV_SUBJECTS: Mapping[str, SubjectEntry[ConvBackend]] = {
    "reference": SubjectEntry(ReferenceConv),
    "cpu": SubjectEntry(CpuConv),
    **({"cpu, without AVX-512": SubjectEntry(partial(CpuConv, processor="haswell"), slow=True)} if ON_X86 else {}),
    "triton, interpreted": SubjectEntry(lambda: choose_conv("triton", CPU), **_BY_TRITON),
    "triton": SubjectEntry(lambda: choose_conv("triton", CUDA), **_ON_GPU),
}
SSD_SUBJECTS: Mapping[str, SubjectEntry[SsdBackend]] = {
    "reference": SubjectEntry(ReferenceSsd),
    "cpu": SubjectEntry(CpuSsd),
    **({"cpu, without AVX-512": SubjectEntry(partial(CpuSsd, processor="haswell"), slow=True)} if ON_X86 else {}),
    "triton, interpreted": SubjectEntry(
        _interpreted_ssd,
        **_BY_TRITON,
        skips={torch.bfloat16: "Triton's interpreter gets the product of bf16 tiles wrong; tested on a GPU"},
    ),
    "triton": SubjectEntry(lambda: choose_ssd("triton", CUDA), **_ON_GPU),
}


@dataclass(frozen=True, slots=True)
class Subject(Generic[B]):
    """One backend, freshly made, and a dtype it takes. Tensors go in and come out on the CPU."""

    backend: B
    entry: SubjectEntry[B]
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.entry.device


def make_subject(entries: Mapping[str, SubjectEntry[B]], name: str) -> Subject[B]:
    """The subject of that name; skips the test when this machine lacks something for it."""
    entry = entries[name]
    missing = entry.missing()
    if missing is not None:
        pytest.skip(missing)
    return Subject(entry.create(), entry, next(dtype for dtype in DTYPES if dtype not in entry.skips))


def every_subject(entries: Mapping[str, SubjectEntry[B]]) -> list[object]:
    """Parameters of a fixture."""
    return [pytest.param(name, marks=entry.marks) for name, entry in entries.items()]


def matrix(entries: Mapping[str, SubjectEntry[B]], *axes: Sequence[object]) -> list[object]:
    """Parameters of ``(subject, dtype, *axes)``, subject indirect: all combinations, or those that the entry asks
    for."""
    params: list[object] = []
    for name, entry in entries.items():
        tested = [dtype for dtype in DTYPES if dtype not in entry.skips]
        params += _params(name, entry, (tested, *axes))
        for dtype, reason in entry.skips.items():
            marks = (*entry.marks, pytest.mark.skip(reason=reason))
            params.append(pytest.param(name, dtype, *(axis[0] for axis in axes), marks=marks, id=f"{name}-{dtype}"))
    return params


def combinations(entries: Mapping[str, SubjectEntry[B]], *axes: Sequence[object]) -> list[object]:
    """Parameters of ``(subject, *axes)``, likewise."""
    return [param for name, entry in entries.items() for param in _params(name, entry, axes)]


def _params(name: str, entry: SubjectEntry[B], axes: Sequence[Sequence[object]]) -> list[object]:
    if entry.interpreted:
        longest = max(len(axis) for axis in axes)
        rows = [  # the largest sizes, which come last, are not those of the largest steps
            tuple(axis[(index + place // 2) % len(axis)] for place, axis in enumerate(axes)) for index in range(longest)
        ]
    else:
        rows = pairwise(*axes) if entry.slow else list(itertools.product(*axes))
    return [pytest.param(name, *row, marks=entry.marks, id=_id(name, row)) for row in rows]


def _id(name: str, row: Sequence[object]) -> str:
    return "-".join([name, *(str(value) for value in row)])


#: decodes that go on in place, from a slot that others read too, and from nothing
_DECODES = (
    StateSpan(1, slot=3, source=3, num_limited=1),
    StateSpan(1, slot=9, source=20, saves=((1, 10),)),
    StateSpan(1, slot=0),
    StateSpan(1, slot=23, source=20),
)
#: fewer rows than a kernel is wide; saves at the first and the last row, and of what the slot itself held; rows beyond
#: one tile
_CHUNKS = (
    StateSpan(2, slot=5, source=5, num_limited=1),
    StateSpan(3, slot=6, saves=((1, 7), (3, 8)), num_limited=3),
    StateSpan(4, slot=1, source=1, saves=((1, 2), (2, 4)), num_limited=2),
    StateSpan(16, slot=12, source=20, saves=((5, 13), (15, 14), (16, 15)), num_limited=9),
    StateSpan(70, slot=16, source=16, saves=((64, 17), (65, 18)), num_limited=70),
)
#: two of each
FEW = (_DECODES[1], _DECODES[0], _CHUNKS[1], _CHUNKS[3])
STEPS: Mapping[str, tuple[StateSpan, ...]] = {
    "decodes": _DECODES,
    "chunks": _CHUNKS,
    "decodes and chunks": (*_DECODES, *_CHUNKS),
    "one decode": _DECODES[:1],
    "a chunk of several tiles": (
        StateSpan(1, slot=1, source=1),
        StateSpan(150, slot=2, saves=((16, 4), (128, 5), (150, 6)), num_limited=150),
    ),
}


def rows_of(spans: Sequence[StateSpan]) -> list[slice]:
    """Where each span's rows lie."""
    stops = list(itertools.accumulate(span.num_rows for span in spans))
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def read_slots(spans: Sequence[StateSpan]) -> set[int]:
    return {span.source for span in spans} - {BLANK}


def written_slots(spans: Sequence[StateSpan]) -> set[int]:
    return {slot for span in spans for slot in (span.slot, *(slot for _, slot in span.saves))}


def keep_only(states: torch.Tensor, slots: set[int]) -> torch.Tensor:
    """The states with NaN in all other slots."""
    others = [slot for slot in range(len(states)) if slot not in slots]
    kept = states.clone()
    kept[others] = float("nan")
    return kept


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether they are equal where NaN equals NaN."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    return torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))


def apart(values: torch.Tensor, before: int = 3, after: int = 5) -> torch.Tensor:
    """The same ``[T, ...]`` as a view of part of each row of a wider tensor, which is NaN elsewhere."""
    width = math.prod(values.shape[1:])
    wide = torch.full((len(values), before + width + after), float("nan"), dtype=values.dtype)
    view = wide[:, before : before + width].view(values.shape)
    view.copy_(values)
    return view
