"""The lora op's contract without vectors, for every backend that runs here, against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from loraplex_kernels.lora import Factors, PartDelta, SlotDelta
from loraplex_kernels.segments import Term, plan_rows
from loraplex_kernels.testing import (
    POPULARITIES,
    decode_plan,
    expected_output,
    mixed_plan,
    mixed_slots,
    popularity_slots,
    worst_excess,
)
from tests.ops.lora_subjects import DTYPES, Subject, matrix, pairwise

# (in, parts): one part, packed parts of equal, divisible and odd sizes, rows no vector width divides
SHAPES = [(64, (48,)), (33, (7,)), (64, (64, 16, 16)), (48, (40, 40)), (37, (13, 5, 9)), (1, (1, 1))]


@pytest.mark.parametrize(
    ("subject", "dtype", "shape", "popularity"), matrix(SHAPES, POPULARITIES), indirect=["subject"]
)
def test_matches_the_formula(
    subject: Subject,
    dtype: torch.dtype,
    shape: tuple[int, tuple[int, ...]],
    popularity: str,
    generator: torch.Generator,
) -> None:
    in_features, parts = shape
    slots = mixed_slots(9, in_features, parts, dtype, generator)
    table = subject.table(in_features, parts, dtype, slots)
    requests = popularity_slots(popularity, 11, 9, generator)
    for plan in (decode_plan(requests), mixed_plan(requests, 19), decode_plan(requests[:1])):
        x = torch.randn(plan.num_rows, in_features, generator=generator).to(dtype)
        y = torch.randn(plan.num_rows, sum(parts), generator=generator).to(dtype)
        got = subject.added(table, y, x, plan)
        assert got.dtype == dtype
        assert worst_excess(got, expected_output(y, x, plan, slots, parts), dtype) <= 1


@pytest.mark.parametrize(("subject", "dtype"), matrix(), indirect=["subject"])
def test_weights_and_several_terms(subject: Subject, dtype: torch.dtype, generator: torch.Generator) -> None:
    parts = (24, 8, 8)
    slots = mixed_slots(6, 32, parts, dtype, generator)
    table = subject.table(32, parts, dtype, slots)
    other = subject.fill_elsewhere([99])
    plan = plan_rows(
        [
            (2, (Term(0, 0.5), Term(3, -1.5))),
            (1, (Term(1),)),
            (3, ()),
            (1, (Term(2, 0.25), Term(2, 0.5), Term(99, 3.0))),  # a slot twice, and one that holds nothing here
            (70, (Term(4, 2.0), Term(5, 0.125))),
            (4, (Term(99),)),
        ]
    )
    x = torch.randn(plan.num_rows, 32, generator=generator).to(dtype)
    y = torch.randn(plan.num_rows, sum(parts), generator=generator).to(dtype)
    got = subject.added(table, y, x, plan)
    assert worst_excess(got, expected_output(y, x, plan, slots, parts), dtype) <= 1
    assert torch.equal(got[3:6], y[3:6])
    assert torch.equal(got[-4:], y[-4:])
    assert other.part_sizes == (1,)


@pytest.mark.parametrize(("subject", "dtype"), matrix(), indirect=["subject"])
def test_lookup_form(subject: Subject, dtype: torch.dtype, generator: torch.Generator) -> None:
    slots = mixed_slots(5, 50, (24,), dtype, generator)
    table = subject.table(50, (24,), dtype, slots)
    plan = plan_rows([(3, (Term(0),)), (2, ()), (1, (Term(4, 0.5), Term(1))), (6, (Term(2),))])
    token_ids = torch.randint(50, (plan.num_rows,), generator=generator)
    y = torch.randn(plan.num_rows, 24, generator=generator).to(dtype)
    got = subject.looked_up(table, y, token_ids, plan)
    one_hot = torch.nn.functional.one_hot(token_ids, 50)
    assert worst_excess(got, expected_output(y, one_hot, plan, slots, (24,)), dtype) <= 1


def test_no_rows_and_no_segments(subject: Subject) -> None:
    table = subject.table(4, (3, 2), torch.float32)
    for rows in (0, 3):
        y, x, plan = torch.ones(rows, 5), torch.ones(rows, 4), plan_rows([(rows, ())])
        assert torch.equal(subject.added(table, y, x, plan), y)
        assert torch.equal(subject.looked_up(table, y, torch.zeros(rows, dtype=torch.int64), plan), y)
        assert torch.equal(subject.scaled(table, x, plan), x)


def test_same_twice_and_alone(subject: Subject, generator: torch.Generator) -> None:
    parts = (16, 8)
    slots = mixed_slots(8, 24, parts, torch.float32, generator)
    table = subject.table(24, parts, torch.float32, slots)
    plan = decode_plan(range(8))
    x, y = torch.randn(8, 24, generator=generator), torch.randn(8, 24, generator=generator)
    together = subject.added(table, y, x, plan)
    assert torch.equal(together, subject.added(table, y, x, plan))
    for row in range(8):
        alone = subject.added(table, y[row : row + 1], x[row : row + 1], decode_plan([row]))
        assert worst_excess(alone, together[row : row + 1], torch.float32) <= 1


def test_shapes_of_a_step_are_checked(subject: Subject) -> None:
    delta = SlotDelta((PartDelta(Factors(torch.ones(1, 4), torch.ones(3, 1))),))
    table = subject.table(4, (3,), torch.float32, {0: delta})
    with pytest.raises(ValueError, match=r"y is \[2, 4\]"):
        subject.added(table, torch.zeros(2, 4), torch.zeros(2, 4), decode_plan([0, 0]))
    with pytest.raises(ValueError, match=r"its input \[3\]"):
        subject.looked_up(table, torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), decode_plan([0, 0]))


def test_a_strided_input_is_read_right(subject: Subject) -> None:
    factors = Factors(torch.eye(4)[:2], torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    table = subject.table(4, (3,), torch.float32, {0: SlotDelta((PartDelta(factors),))})
    plan = subject.backend.prepare(decode_plan([0, 0]))
    wide = torch.arange(16.0, device=subject.device).view(2, 8)
    for x in (wide[:, 2:6], wide.view(4, 4).t()[:2]):
        y = torch.zeros(2, 3, device=subject.device)
        table.add_(y, x, plan)
        assert y.tolist() == [[row[0], row[1], row[0] + row[1]] for row in x.tolist()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tolerances_can_fail(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Three plausible bugs, each made once in the formula: all are far outside what the tests above allow."""
    parts = (16, 8)
    slots = mixed_slots(4, 32, parts, dtype, generator)
    plan = plan_rows([(2, (Term(0),)), (2, (Term(1, 0.5),)), (3, (Term(2),))])
    x = torch.randn(7, 32, generator=generator).to(dtype)
    y = torch.randn(7, 24, generator=generator).to(dtype)
    right = expected_output(y, x, plan, slots, parts)
    unweighted = plan_rows([(2, (Term(0),)), (2, (Term(1),)), (3, (Term(2),))])
    shifted = plan_rows([(1, (Term(0),)), (2, (Term(1, 0.5),)), (4, (Term(2),))])
    for wrong in (
        expected_output(y, -x, plan, slots, parts),
        expected_output(y, x, unweighted, slots, parts),
        expected_output(y, x, shifted, slots, parts),
    ):
        assert worst_excess(wrong.to(dtype), right, dtype) > 10
    assert worst_excess(right.to(dtype), right, dtype) <= 1


def test_pairs_cover_what_they_say() -> None:
    axes = (DTYPES, SHAPES, POPULARITIES)
    rows = pairwise(*axes)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert {(row[one], row[other]) for row in rows} == {(a, b) for a in axes[one] for b in axes[other]}
    assert len(rows) < 40
