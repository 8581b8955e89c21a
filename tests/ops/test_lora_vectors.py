"""The lora op's scales and shifts, alone, together and beside factors, against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from loraplex_kernels.lora import PartDelta, SlotDelta
from loraplex_kernels.segments import SegmentPlan, Term, plan_rows
from loraplex_kernels.testing import expected_input, expected_output, mixed_slots, random_scale, worst_excess
from tests.ops.lora_subjects import Subject, matrix

IN, PARTS = 37, (24, 9, 9)
#: what each slot has beside or instead of its factors
KINDS = ("out_scale", "shift", "in_scale", "all", "all and factors", "mixed")
PLANS = {
    "decodes": plan_rows([(1, (Term(0),)), (2, ()), (1, (Term(1),)), (1, (Term(2),)), (1, (Term(3),))]),
    "terms": plan_rows(
        [(3, (Term(0, 0.5), Term(1, -1.5))), (1, (Term(2), Term(2, 0.25), Term(9))), (2, (Term(3, 0.0),))]
    ),
    "chunks": plan_rows([(2, (Term(1, 2.0),)), (21, (Term(2),)), (33, (Term(3, 0.5), Term(0)))]),
}


def make_slots(kind: str, dtype: torch.dtype, generator: torch.Generator) -> dict[int, SlotDelta]:
    """Four slots. Mixed: each part of each slot has something else, some nothing, and slot 3 factors alone."""
    factors = mixed_slots(4, IN, PARTS, dtype, generator)
    slots: dict[int, SlotDelta] = {}
    for slot, held in factors.items():
        parts: list[PartDelta | None] = []
        for index, (part, size) in enumerate(zip(held.parts, PARTS, strict=True)):
            scale, shift = random_scale(size, generator), torch.randn(size, generator=generator)
            made = PartDelta(
                part.factors if part is not None and kind == "all and factors" else None,
                scale if kind.startswith(("out_scale", "all")) else None,
                shift if kind.startswith(("shift", "all")) else None,
            )
            if kind == "mixed":
                choices = (
                    part,
                    PartDelta(out_scale=scale),
                    PartDelta(shift=shift),
                    None,
                    PartDelta(None, scale, shift),
                )
                made = choices[(slot + 2 * index) % len(choices)]
            parts.append(None if kind == "in_scale" else made)
        scaled = kind.startswith(("in_scale", "all")) or (kind == "mixed" and slot % 2 == 0)
        slots[slot] = SlotDelta(tuple(parts), random_scale(IN, generator) if scaled else None)
    if kind == "mixed":
        slots[3] = factors[3]
    return slots


@pytest.mark.parametrize(("subject", "dtype", "kind", "plan"), matrix(KINDS, list(PLANS)), indirect=["subject"])
def test_matches_the_formula(
    subject: Subject, dtype: torch.dtype, kind: str, plan: str, generator: torch.Generator
) -> None:
    slots, segments = make_slots(kind, dtype, generator), PLANS[plan]
    table = subject.table(IN, PARTS, dtype, slots)
    other = subject.fill_elsewhere([9])
    x = torch.randn(segments.num_rows, IN, generator=generator).to(dtype)
    y = torch.randn(segments.num_rows, sum(PARTS), generator=generator).to(dtype)
    got, got_input = subject.added(table, y, x, segments), subject.scaled(table, x, segments)
    assert worst_excess(got, expected_output(y, x, segments, slots, PARTS), dtype) <= 1
    assert got_input.dtype == dtype
    assert worst_excess(got_input, expected_input(x, segments, slots), dtype) <= 1
    assert other.part_sizes == (1,)


@pytest.mark.parametrize(("subject", "dtype"), matrix(), indirect=["subject"])
def test_base_rows_and_other_tables_slots_keep_their_bits(
    subject: Subject, dtype: torch.dtype, generator: torch.Generator
) -> None:
    slots = make_slots("all and factors", dtype, generator)
    table = subject.table(IN, PARTS, dtype, slots)
    other = subject.fill_elsewhere([9])
    plan = plan_rows([(2, (Term(1),)), (3, ()), (2, (Term(9, 2.0),)), (1, (Term(2),)), (2, ())])
    x = torch.randn(plan.num_rows, IN, generator=generator).to(dtype)
    y = torch.randn(plan.num_rows, sum(PARTS), generator=generator).to(dtype)
    got, got_input = subject.added(table, y, x, plan), subject.scaled(table, x, plan)
    for rows in (slice(2, 7), slice(8, 10)):
        assert torch.equal(got[rows], y[rows])
        assert torch.equal(got_input[rows], x[rows])
    assert other.part_sizes == (1,)


@pytest.mark.parametrize(("subject", "dtype", "kind"), matrix(KINDS[:4]), indirect=["subject"])
def test_rows_have_the_bits_that_they_get_alone(
    subject: Subject, dtype: torch.dtype, kind: str, generator: torch.Generator
) -> None:
    slots = make_slots(kind, dtype, generator)
    table = subject.table(IN, PARTS, dtype, slots)
    plan = plan_rows([(1, (Term(0),)), (1, (Term(1),)), (9, (Term(2),)), (1, ()), (2, (Term(3, 0.5), Term(0)))])
    x = torch.randn(plan.num_rows, IN, generator=generator).to(dtype)
    y = torch.randn(plan.num_rows, sum(PARTS), generator=generator).to(dtype)
    got, got_input = subject.added(table, y, x, plan), subject.scaled(table, x, plan)
    for segment in plan.segments:
        rows, alone = slice(segment.start, segment.stop), plan_rows([(segment.stop - segment.start, segment.terms)])
        assert torch.equal(got[rows], subject.added(table, y[rows], x[rows], alone))
        assert torch.equal(got_input[rows], subject.scaled(table, x[rows], alone))


def test_an_input_nobody_scales_is_returned_as_it_is(subject: Subject, generator: torch.Generator) -> None:
    slots = make_slots("all", torch.float32, generator)
    unscaled = SlotDelta(slots[0].parts)
    table = subject.table(IN, PARTS, torch.float32, {0: unscaled, 1: slots[1]})
    plain = subject.table(IN, PARTS, torch.float32, {0: unscaled})
    x = torch.randn(3, IN, generator=generator).to(subject.device)
    with_slot_1 = subject.backend.prepare(plan_rows([(1, (Term(1),)), (2, (Term(0),))]))
    without = subject.backend.prepare(plan_rows([(1, ()), (2, (Term(0),))]))
    assert table.scale_input(x, without) is x
    assert plain.scale_input(x, with_slot_1) is x
    assert table.scale_input(x, with_slot_1) is not x
    table.clear(1)
    other = subject.fill_elsewhere([1])
    assert table.scale_input(x, subject.backend.prepare(with_slot_1.segments)) is x
    assert other.part_sizes == (1,)


@pytest.mark.parametrize(("subject", "dtype"), matrix(), indirect=["subject"])
def test_lookups_are_scaled_and_shifted(subject: Subject, dtype: torch.dtype, generator: torch.Generator) -> None:
    factors = mixed_slots(3, 50, (24,), dtype, generator)
    vectors = [PartDelta(None, random_scale(24, generator), random_scale(24, generator)) for _ in range(2)]
    slots = {0: SlotDelta((vectors[0]._replace(factors=factors[0].parts[0].factors),)), 1: SlotDelta((vectors[1],))}
    slots[2] = factors[2]
    table = subject.table(50, (24,), dtype, slots)
    plan = plan_rows([(3, (Term(0),)), (2, ()), (1, (Term(1, 0.5), Term(2))), (6, (Term(1),))])
    token_ids = torch.randint(50, (plan.num_rows,), generator=generator)
    y = torch.randn(plan.num_rows, 24, generator=generator).to(dtype)
    got = subject.looked_up(table, y, token_ids, plan)
    one_hot = torch.nn.functional.one_hot(token_ids, 50)
    assert worst_excess(got, expected_output(y, one_hot, plan, slots, (24,)), dtype) <= 1


def test_clearing_a_slot_leaves_the_vectors_of_others(subject: Subject, generator: torch.Generator) -> None:
    slots = {**mixed_slots(2, IN, PARTS, torch.float32, generator), 2: make_slots("all", torch.float32, generator)[2]}
    table = subject.table(IN, PARTS, torch.float32, slots)
    plan = plan_rows([(2, (Term(2),))])
    x, y = torch.randn(2, IN, generator=generator), torch.randn(2, sum(PARTS), generator=generator)
    before = subject.added(table, y, x, plan), subject.scaled(table, x, plan)
    for change in (lambda: table.clear(0), lambda: table.write(1, table.pack(slots[0]))):
        change()
        assert torch.equal(subject.added(table, y, x, plan), before[0])
        assert torch.equal(subject.scaled(table, x, plan), before[1])


@pytest.mark.parametrize("flaw", ["scale", "shift", "weight", "order", "input"])
def test_the_formula_tells_vectors_apart(flaw: str, generator: torch.Generator) -> None:
    """Plausible bugs, each made once in the formula, are far outside what the tests above allow in any dtype."""
    slots, plan = make_slots("all and factors", torch.float32, generator), PLANS["terms"]
    x, y = torch.randn(plan.num_rows, IN, generator=generator), torch.randn(plan.num_rows, 42, generator=generator)
    right = expected_output(y, x, plan, slots, PARTS)
    wrong = {
        "scale": expected_output(y, x, plan, _without(slots, "out_scale"), PARTS),
        "shift": expected_output(y, x, plan, _without(slots, "shift"), PARTS),
        "weight": expected_output(y, x, _unweighted(plan), slots, PARTS),
        "order": _scaled_last(y, x, plan, slots),
        "input": expected_output(y, expected_input(x, plan, slots), plan, slots, PARTS),
    }[flaw]
    assert worst_excess(wrong, right, torch.bfloat16) > 10


def _without(slots: dict[int, SlotDelta], field: str) -> dict[int, SlotDelta]:
    return {
        slot: SlotDelta(tuple(part and part._replace(**{field: None}) for part in delta.parts), delta.in_scale)
        for slot, delta in slots.items()
    }


def _unweighted(plan: SegmentPlan) -> SegmentPlan:
    return plan_rows((s.stop - s.start, tuple(Term(term.slot) for term in s.terms)) for s in plan.segments)


def _scaled_last(y: torch.Tensor, x: torch.Tensor, plan: SegmentPlan, slots: dict[int, SlotDelta]) -> torch.Tensor:
    """Scales applied to the base and the products together, as they must not be."""
    products = expected_output(y, x, plan, _without(slots, "out_scale"), PARTS)
    no_factors = _without(_without(slots, "factors"), "shift")
    return expected_output(products, x, plan, no_factors, PARTS)
