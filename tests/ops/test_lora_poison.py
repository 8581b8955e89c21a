"""The lora op: nothing of one segment, adapter or row reaches another's rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loraplex_kernels.lora import Factors, PartDelta, SlotDelta
from loraplex_kernels.segments import Term, plan_rows
from loraplex_kernels.testing import decode_plan, mixed_slots, poison_, random_scale
from tests.ops.lora_subjects import SUBJECTS, Subject, matrix

PARTS = (16, 8, 8)
VALUES = (float("nan"), float("inf"), -1e30, 6e4)


def values() -> list[object]:
    """Every value; for slow subjects one that is not finite and one that is huge, other ones in each dtype."""
    few = {
        (torch.float32, VALUES[0]),
        (torch.float32, VALUES[2]),
        (torch.float16, VALUES[1]),
        (torch.float16, VALUES[3]),
    }
    params: list[Any] = matrix(VALUES)
    return [
        param for param in params if not SUBJECTS[param.values[0]].slow or param.marks or tuple(param.values[1:]) in few
    ]


@pytest.mark.parametrize(("subject", "dtype", "value"), values(), indirect=["subject"])
def test_poisoned_rows_reach_no_other_row(
    subject: Subject, dtype: torch.dtype, value: float, generator: torch.Generator
) -> None:
    slots = mixed_slots(6, 32, PARTS, dtype, generator)
    vectors = PartDelta(out_scale=random_scale(8, generator), shift=random_scale(8, generator))
    slots[2] = SlotDelta((slots[2].parts[0], vectors, None), random_scale(32, generator))
    table = subject.table(32, PARTS, dtype, slots)
    plan = plan_rows(
        [(1, (Term(0),)), (2, (Term(1), Term(4))), (1, ()), (1, (Term(2),)), (40, (Term(3),)), (2, (Term(5),))]
    )
    x = torch.randn(plan.num_rows, 32, generator=generator).to(dtype)
    y = torch.randn(plan.num_rows, sum(PARTS), generator=generator).to(dtype)
    clean, clean_input = subject.added(table, y, x, plan), subject.scaled(table, x, plan)
    for bad in (slice(0, 1), slice(1, 2), slice(4, 5), slice(7, 9), slice(45, 47)):
        poisoned_x, poisoned_y = poison_(x.clone(), bad, value), poison_(y.clone(), bad, value)
        keep = torch.ones(plan.num_rows, dtype=torch.bool)
        keep[bad] = False
        assert torch.equal(subject.added(table, poisoned_y, poisoned_x, plan)[keep], clean[keep])
        assert torch.equal(subject.scaled(table, poisoned_x, plan)[keep], clean_input[keep])


@pytest.mark.parametrize(("subject", "dtype"), matrix(), indirect=["subject"])
def test_overflow_stays_with_its_adapter(subject: Subject, dtype: torch.dtype, generator: torch.Generator) -> None:
    slots = mixed_slots(4, 32, (16,), dtype, generator)
    largest = torch.finfo(dtype).max
    huge = Factors(torch.full((8, 32), largest, dtype=dtype), torch.full((16, 8), largest, dtype=dtype))
    plan = decode_plan([0, 1, 2, 3])
    x, y = torch.ones(4, 32, dtype=dtype), torch.ones(4, 16, dtype=dtype)
    table = subject.table(32, (16,), dtype, slots)
    clean = subject.added(table, y, x, plan)
    table.write(2, table.pack(SlotDelta((PartDelta(huge, torch.full((16,), 1e38)),))))
    got = subject.added(table, y, x, plan)
    assert not torch.isfinite(got[2]).any()
    assert torch.equal(got[[0, 1, 3]], clean[[0, 1, 3]])
