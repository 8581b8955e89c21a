"""The lora op's contract, for every backend that runs here, against a float64 formula written out below."""

from __future__ import annotations

import pytest
import torch

from loraplex_kernels.backend import LORA, choose_lora
from loraplex_kernels.lora import Factors, LoraBackend, LoraTable
from loraplex_kernels.lora.cpu import CpuLora, CpuTable
from loraplex_kernels.lora.cpu_kernels import has_kernel
from loraplex_kernels.segments import SegmentPlan, Term, plan_rows
from loraplex_kernels.testing import (
    MIXED_RANKS,
    POPULARITIES,
    decode_plan,
    mixed_plan,
    poison_,
    popularity_slots,
    random_factors,
    worst_excess,
)

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (in, parts): one part, packed parts of equal, divisible and odd sizes, rows no vector width divides
SHAPES = [(64, (48,)), (33, (7,)), (64, (64, 16, 16)), (48, (40, 40)), (37, (13, 5, 9)), (1, (1, 1))]
BIG = 1 << 40

Slots = dict[int, list[Factors | None]]


@pytest.fixture(params=[*sorted(LORA), "cpu, library alone"])
def backend(request: pytest.FixtureRequest) -> LoraBackend:
    return choose_lora(request.param, CPU) if request.param in LORA else CpuLora(compiled=False)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def rounded(factors: Factors, dtype: torch.dtype) -> Factors:
    return Factors(factors.a.to(dtype), factors.b.to(dtype))


def make_slots(
    num_slots: int, in_features: int, parts: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Slots:
    """Mixed ranks, over slots and within a slot, and a part missing here and there."""
    slots: Slots = {}
    for slot in range(num_slots):
        ranks = [
            MIXED_RANKS[(slot + (index if slot % 3 == 2 else 0)) % len(MIXED_RANKS)] for index in range(len(parts))
        ]
        slots[slot] = [
            None if slot % 4 == 3 and index == 1 else rounded(random_factors(rank, in_features, size, generator), dtype)
            for index, (rank, size) in enumerate(zip(ranks, parts, strict=True))
        ]
    return slots


def table_of(
    backend: LoraBackend, in_features: int, parts: tuple[int, ...], dtype: torch.dtype, slots: Slots
) -> LoraTable:
    table = backend.new_table(in_features, parts, dtype=dtype, device=CPU, max_bytes=BIG)
    for slot, factors in slots.items():
        table.write(slot, factors)
    return table


def formula(y: torch.Tensor, x: torch.Tensor, plan: SegmentPlan, slots: Slots, parts: tuple[int, ...]) -> torch.Tensor:
    """The contract in float64; x ``[T, in]``."""
    expected = y.double().clone()
    for segment in plan.segments:
        for term in segment.terms:
            first = 0
            for factors, size in zip(slots.get(term.slot, [None] * len(parts)), parts, strict=True):
                if factors is not None:
                    delta = x[segment.start : segment.stop].double() @ factors.a.double().T @ factors.b.double().T
                    expected[segment.start : segment.stop, first : first + size] += term.weight * delta
                first += size
    return expected


def added(backend: LoraBackend, table: LoraTable, y: torch.Tensor, x: torch.Tensor, plan: SegmentPlan) -> torch.Tensor:
    result = y.clone()
    table.add_(result, x, backend.prepare(plan))
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_matches_the_formula(
    backend: LoraBackend,
    popularity: str,
    shape: tuple[int, tuple[int, ...]],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    in_features, parts = shape
    slots = make_slots(9, in_features, parts, dtype, generator)
    table = table_of(backend, in_features, parts, dtype, slots)
    requests = popularity_slots(popularity, 11, 9, generator)
    for plan in (decode_plan(requests), mixed_plan(requests, 19), decode_plan(requests[:1])):
        x = torch.randn(plan.num_rows, in_features, generator=generator).to(dtype)
        y = torch.randn(plan.num_rows, sum(parts), generator=generator).to(dtype)
        got = added(backend, table, y, x, plan)
        assert got.dtype == dtype
        assert worst_excess(got, formula(y, x, plan, slots, parts), dtype) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_and_several_terms(backend: LoraBackend, dtype: torch.dtype, generator: torch.Generator) -> None:
    parts = (24, 8, 8)
    slots = make_slots(6, 32, parts, dtype, generator)
    table = table_of(backend, 32, parts, dtype, slots)
    plan = plan_rows(
        [
            (2, (Term(0, 0.5), Term(3, -1.5))),
            (1, (Term(1),)),
            (3, ()),
            (1, (Term(2, 0.25), Term(2, 0.5), Term(99, 3.0))),  # a slot twice, and one that holds nothing
            (70, (Term(4, 2.0), Term(5, 0.125))),
            (4, (Term(99),)),
        ]
    )
    x = torch.randn(plan.num_rows, 32, generator=generator).to(dtype)
    y = torch.randn(plan.num_rows, sum(parts), generator=generator).to(dtype)
    got = added(backend, table, y, x, plan)
    assert worst_excess(got, formula(y, x, plan, slots, parts), dtype) <= 1
    assert torch.equal(got[3:6], y[3:6])
    assert torch.equal(got[-4:], y[-4:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lookup_form(backend: LoraBackend, dtype: torch.dtype, generator: torch.Generator) -> None:
    slots = make_slots(5, 50, (24,), dtype, generator)
    table = table_of(backend, 50, (24,), dtype, slots)
    plan = plan_rows([(3, (Term(0),)), (2, ()), (1, (Term(4, 0.5), Term(1))), (6, (Term(2),))])
    token_ids = torch.randint(50, (plan.num_rows,), generator=generator)
    y = torch.randn(plan.num_rows, 24, generator=generator).to(dtype)
    got = y.clone()
    table.add_lookup_(got, token_ids, backend.prepare(plan))
    one_hot = torch.nn.functional.one_hot(token_ids, 50)
    assert worst_excess(got, formula(y, one_hot, plan, slots, (24,)), dtype) <= 1


def test_no_rows_and_no_segments(backend: LoraBackend) -> None:
    table = backend.new_table(4, (3, 2), dtype=torch.float32, device=CPU, max_bytes=BIG)
    for rows in (0, 3):
        y = torch.ones(rows, 5)
        table.add_(y, torch.ones(rows, 4), backend.prepare(plan_rows([(rows, ())])))
        assert torch.equal(y, torch.ones(rows, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30, 6e4])
def test_poisoned_rows_reach_no_other_row(
    backend: LoraBackend, value: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    parts = (16, 8, 8)
    slots = make_slots(6, 32, parts, dtype, generator)
    table = table_of(backend, 32, parts, dtype, slots)
    plan = plan_rows(
        [(1, (Term(0),)), (2, (Term(1), Term(4))), (1, ()), (1, (Term(2),)), (40, (Term(3),)), (2, (Term(5),))]
    )
    x = torch.randn(plan.num_rows, 32, generator=generator).to(dtype)
    y = torch.randn(plan.num_rows, sum(parts), generator=generator).to(dtype)
    clean = added(backend, table, y, x, plan)
    for bad in (slice(0, 1), slice(1, 2), slice(4, 5), slice(7, 9), slice(45, 47)):
        got = added(backend, table, y, poison_(x.clone(), bad, value), plan)
        keep = torch.ones(plan.num_rows, dtype=torch.bool)
        keep[bad] = False
        assert torch.equal(got[keep], clean[keep])


def test_overflow_stays_with_its_adapter(backend: LoraBackend, generator: torch.Generator) -> None:
    slots = make_slots(4, 32, (16,), torch.bfloat16, generator)
    huge = Factors(torch.full((8, 32), 3e38, dtype=torch.bfloat16), torch.full((16, 8), 3e38, dtype=torch.bfloat16))
    plan = decode_plan([0, 1, 2, 3])
    x, y = torch.ones(4, 32, dtype=torch.bfloat16), torch.ones(4, 16, dtype=torch.bfloat16)
    table = table_of(backend, 32, (16,), torch.bfloat16, slots)
    clean = added(backend, table, y, x, plan)
    table.write(2, [huge])
    got = added(backend, table, y, x, plan)
    assert not torch.isfinite(got[2]).any()
    assert torch.equal(got[[0, 1, 3]], clean[[0, 1, 3]])


def test_slots_are_rewritten_and_cleared(backend: LoraBackend, generator: torch.Generator) -> None:
    parts = (12, 12)
    slots: Slots = {}
    table = backend.new_table(20, parts, dtype=torch.float32, device=CPU, max_bytes=BIG)
    for step in range(60):
        slot = int(torch.randint(12, (1,), generator=generator))
        if step % 4 == 3:
            table.clear(slot)
            slots.pop(slot, None)
        else:
            slots[slot] = [random_factors(1 + step % 7, 20, size, generator) for size in parts]
            if step % 5 == 0:
                slots[slot][step % 2] = None
            table.write(slot, slots[slot])
        wanted = torch.randperm(12, generator=generator)[:5].sort().values.tolist()
        plan = decode_plan(wanted)
        x, y = torch.randn(5, 20, generator=generator), torch.randn(5, 24, generator=generator)
        got = added(backend, table, y, x, plan)
        assert worst_excess(got, formula(y, x, plan, slots, parts), torch.float32) <= 1, step


def test_few_active_among_many_resident(backend: LoraBackend, generator: torch.Generator) -> None:
    slots: Slots = {slot: [random_factors(1 + slot % 5, 16, 8, generator)] for slot in range(300)}
    table = table_of(backend, 16, (8,), torch.float32, slots)
    for wanted in ([3, 120, 121, 299], [0, 1, 298], list(range(0, 300, 10)), [3, 120, 121, 299]):
        plan = decode_plan(wanted)
        x, y = torch.randn(len(wanted), 16, generator=generator), torch.randn(len(wanted), 8, generator=generator)
        got = added(backend, table, y, x, plan)
        assert worst_excess(got, formula(y, x, plan, slots, (8,)), torch.float32) <= 1


def test_same_twice_and_alone(backend: LoraBackend, generator: torch.Generator) -> None:
    parts = (16, 8)
    slots = make_slots(8, 24, parts, torch.float32, generator)
    table = table_of(backend, 24, parts, torch.float32, slots)
    plan = decode_plan(range(8))
    x, y = torch.randn(8, 24, generator=generator), torch.randn(8, 24, generator=generator)
    together = added(backend, table, y, x, plan)
    assert torch.equal(together, added(backend, table, y, x, plan))
    for row in range(8):
        alone = added(backend, table, y[row : row + 1], x[row : row + 1], decode_plan([row]))
        assert worst_excess(alone, together[row : row + 1], torch.float32) <= 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([Factors(torch.ones(2, 4), torch.ones(3, 2))], r"slot 5: 1 parts given, the table has 2"),
        ([None, Factors(torch.ones(2, 3), torch.ones(2, 2))], r"slot 5, part 1: A is \[2, 3\] .* must be \[r, 4\]"),
        ([Factors(torch.ones(2, 4), torch.ones(3, 1)), None], r"slot 5, part 0: .* B is \[3, 1\]"),
        ([Factors(torch.ones(0, 4), torch.ones(3, 0)), None], r"r >= 1"),
        ([Factors(torch.full((1, 4), float("nan")), torch.ones(3, 1)), None], r"slot 5, part 0: A holds .* not finite"),
        (
            [Factors(torch.ones(1, 4), torch.full((3, 1), 1e39, dtype=torch.float64)), None],
            r"slot 5, part 0: B holds .* not finite",
        ),
    ],
)
def test_write_refuses(backend: LoraBackend, parts: list[Factors | None], message: str) -> None:
    table = backend.new_table(4, (3, 2), dtype=torch.float32, device=CPU, max_bytes=BIG)
    before = [Factors(torch.ones(1, 4), torch.ones(3, 1)), None]
    table.write(5, before)
    with pytest.raises(ValueError, match=message):
        table.write(5, parts)
    y = torch.zeros(1, 5)
    table.add_(y, torch.ones(1, 4), backend.prepare(decode_plan([5])))
    assert y.tolist() == [[4.0, 4.0, 4.0, 0.0, 0.0]]


def test_shapes_of_a_step_are_checked(backend: LoraBackend) -> None:
    table = backend.new_table(4, (3,), dtype=torch.float32, device=CPU, max_bytes=BIG)
    with pytest.raises(ValueError, match=r"y is \[2, 4\]"):
        table.add_(torch.zeros(2, 4), torch.zeros(2, 4), backend.prepare(decode_plan([0, 0])))


@pytest.mark.parametrize(
    ("y", "x"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.float64)),
        (torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 4)),
        (torch.zeros(3, 2).t(), torch.zeros(2, 4)),
        (torch.zeros(2, 3), torch.zeros(2, 5)),
    ],
    ids=["x type", "y type", "y transposed", "x too wide"],
)
def test_the_compiled_kernel_is_never_given_wrong_memory(y: torch.Tensor, x: torch.Tensor) -> None:
    if not has_kernel(torch.float32):
        pytest.skip("this processor lacks AVX-512")
    backend = choose_lora("cpu", CPU)
    table = backend.new_table(4, (3,), dtype=torch.float32, device=CPU, max_bytes=BIG)
    table.write(0, [Factors(torch.ones(1, 4), torch.ones(3, 1))])
    with pytest.raises(ValueError, match="the table needs"):
        table.add_(y, x, backend.prepare(decode_plan([0, 0])))


def test_a_strided_input_is_read_right(backend: LoraBackend) -> None:
    table = backend.new_table(4, (3,), dtype=torch.float32, device=CPU, max_bytes=BIG)
    table.write(0, [Factors(torch.eye(4)[:2], torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))])
    wide = torch.arange(16.0).view(2, 8)
    for x in (wide[:, 2:6], wide.view(4, 4).t()[:2]):
        y = torch.zeros(2, 3)
        table.add_(y, x, backend.prepare(decode_plan([0, 0])))
        assert y.tolist() == [[row[0], row[1], row[0] + row[1]] for row in x.tolist()]


def test_cpu_table_keeps_to_its_bytes() -> None:
    backend = choose_lora("cpu", CPU)
    table = backend.new_table(4, (4,), dtype=torch.float32, device=CPU, max_bytes=64)
    one = [Factors(torch.ones(1, 4), torch.ones(4, 1))]  # 32 bytes
    for slot in (0, 1, 0):
        table.write(slot, one)
    with pytest.raises(MemoryError, match=r"slot 2: 32 bytes .* 64 of the table's 64 bytes"):
        table.write(2, one)
    table.clear(0)
    table.write(2, one)


def test_the_compiled_kernel_takes_part() -> None:
    """On a processor that has it; elsewhere the tests above would pass without it."""
    if not has_kernel(torch.bfloat16):
        pytest.skip("this processor lacks AVX512-BF16")
    table = choose_lora("cpu", CPU).new_table(64, (48,), dtype=torch.bfloat16, device=CPU, max_bytes=BIG)
    assert isinstance(table, CpuTable)
    table.write(0, [Factors(torch.ones(4, 64), torch.ones(48, 4))])
    plan = decode_plan([0, 0])
    assert table.split(plan) == (1, 0)
    assert table.split(plan_rows([(1 << 20, (Term(0),))])) == (0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tolerances_can_fail(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Three plausible bugs, each made once in the formula: all are far outside what the tests above allow."""
    parts = (16, 8)
    slots = make_slots(4, 32, parts, dtype, generator)
    plan = plan_rows([(2, (Term(0),)), (2, (Term(1, 0.5),)), (3, (Term(2),))])
    x = torch.randn(7, 32, generator=generator).to(dtype)
    y = torch.randn(7, 24, generator=generator).to(dtype)
    right = formula(y, x, plan, slots, parts)
    flipped = formula(y, -x, plan, slots, parts)
    unweighted = formula(y, x, plan_rows([(2, (Term(0),)), (2, (Term(1),)), (3, (Term(2),))]), slots, parts)
    shifted = formula(y, x, plan_rows([(1, (Term(0),)), (2, (Term(1, 0.5),)), (4, (Term(2),))]), slots, parts)
    for wrong in (flipped, unweighted, shifted):
        assert worst_excess(wrong.to(dtype), right, dtype) > 10
    assert worst_excess(right.to(dtype), right, dtype) <= 1
