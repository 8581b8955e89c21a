"""Own rows for tests: empty tables for layers that a test puts together, and a world of layers, plans and slots."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec

import pytest
import torch

from loraplex.layers.rows import RowsForm, RowsSite
from loraplex.layers.rows_memory import RowsMemory
from loraplex.layers.rows_table import RowsTable
from loraplex_kernels.lora import Factors, LoraBackend, PartDelta, SlotDelta
from loraplex_kernels.lora.slots import SlotBook
from loraplex_kernels.segments import SegmentPlan, Term, plan_rows
from loraplex_kernels.testing import random_factors, random_scale

CPU = torch.device("cpu")


def linear_rows(num_rows: int, width: int, book: SlotBook | None = None) -> RowsTable:
    """An empty table of a linear site without bias, in float32."""
    site = RowsSite(RowsForm.MULTIPLIED, num_rows, width, torch.float32)
    return RowsTable(site, RowsMemory(book or SlotBook(), CPU))


PLANS: dict[str, SegmentPlan] = {
    "mixed": plan_rows(
        [
            (2, (Term(0),)),
            (1, ()),
            (2, (Term(1),)),
            (3, (Term(2),)),
            (1, (Term(4),)),
            (2, (Term(0, 0.5), Term(2))),  # of one sum, one has rows of its own
            (1, (Term(3),)),
            (2, ()),
        ]
    ),
    "all replaced": plan_rows([(2, (Term(3),)), (3, (Term(5),))]),
    "one alone": plan_rows([(1, (Term(2),))]),
    "none of them": plan_rows([(2, (Term(0),)), (1, ())]),
    "base only": plan_rows([(3, ())]),
    "no rows at all": plan_rows([]),
}


@dataclass
class World:
    """Tables of one dtype and what their slots hold, as numbers that the formula reads."""

    lora: LoraBackend
    dtype: torch.dtype
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(5))

    def __post_init__(self) -> None:
        self.memory = RowsMemory(self.lora.slots, CPU)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def rows_table(
        self, form: RowsForm, num_rows: int, width: int, *, bias: bool = False, grows: bool = False
    ) -> RowsTable:
        return RowsTable(RowsSite(form, num_rows, width, self.dtype, bias, grows), self.memory)

    def delta(self, in_features: int, parts: tuple[int, ...], *, in_scale: bool = True) -> SlotDelta:
        """Everything a low-rank table holds, in factors of this dtype."""
        made = []
        for size in parts:
            a, b = random_factors(3, in_features, size, self.generator)
            pair = Factors(a.to(self.dtype), b.to(self.dtype))
            made.append(
                PartDelta(pair, random_scale(size, self.generator), torch.randn(size, generator=self.generator))
            )
        return SlotDelta(tuple(made), random_scale(in_features, self.generator) if in_scale else None)

    def hold_somewhere(self) -> None:
        """Every slot of the plans holds something in some table, as a loaded adapter's does."""
        elsewhere = self.lora.new_table(4, (4,), dtype=self.dtype, device=CPU, max_bytes=1 << 20)
        for slot in range(6):
            elsewhere.write(slot, elsewhere.pack(self.delta(4, (4,))))


_no_interpreter = pytest.mark.skipif(
    torch.cuda.is_available() or find_spec("triton") is None,
    reason="needs Triton's interpreter: there is no triton, or it compiles for the GPU of this machine",
)


#: what a test of layers runs over: a backend's name, and a dtype
WORLDS = [
    *((name, dtype) for name in ("cpu", "reference") for dtype in (torch.float32, torch.bfloat16)),
    pytest.param(("triton", torch.float32), marks=_no_interpreter),  # whose bfloat16 products need a GPU
]
