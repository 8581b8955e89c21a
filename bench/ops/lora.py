"""The lora op at SmolLM2-135M's layers: a backend, a plain loop over segments, a loop over adapters as PEFT runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.ops.timing import WrongResult, interleaved_us
from loraplex_kernels.backend import choose_lora
from loraplex_kernels.lora import Factors, LoraBackend, LoraTable, PartDelta, SlotDelta
from loraplex_kernels.segments import SegmentPlan, Term, plan_rows
from loraplex_kernels.testing import decode_plan, random_factors, worst_excess

CPU = torch.device("cpu")
#: layer -> in, parts
LAYERS = {
    "qkv": (576, (576, 192, 192)),
    "o": (576, (576,)),
    "gate_up": (576, (1536, 1536)),
    "down": (1536, (576,)),
}
RANKS = (8, 16, 32, 64)
MAX_BYTES = 1 << 32


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one step's rows ask for."""

    name: str
    num_slots: int
    plan: SegmentPlan


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the printed table."""

    traffic: str
    layer: str
    us: dict[str, float]


def traffics() -> tuple[Traffic, ...]:
    """The decode steps that the speed goals speak of, and the two ends beside them."""
    return (
        Traffic("1 row, 1 adapter", 4, plan_rows([(1, (Term(2),))])),
        Traffic("32 rows, 1 adapter", 4, plan_rows([(32, (Term(2),))])),
        Traffic("32 rows, 4 adapters", 4, plan_rows((8, (Term(slot),)) for slot in range(4))),
        Traffic("32 rows, 32 adapters of 64", 64, decode_plan(range(0, 64, 2))),
        Traffic(
            "24 rows and a chunk of 96",
            4,
            plan_rows([*((8, (Term(slot),)) for slot in range(3)), (96, (Term(3),))]),
        ),
    )


def run(backend_name: str, dtype: torch.dtype, repeats: int) -> list[Row]:
    """Time every layer under every traffic; raises WrongResult before reporting a wrong way's time."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    for traffic in traffics():
        for layer, (in_features, parts) in LAYERS.items():
            slots = {
                slot: [_rounded(random_factors(RANKS[slot % 4], in_features, size, generator), dtype) for size in parts]
                for slot in range(traffic.num_slots)
            }
            x = torch.randn(traffic.plan.num_rows, in_features, generator=generator).to(dtype)
            ways = _ways(backend_name, slots, x, traffic.plan)
            _check(ways, slots, x, traffic.plan)
            y = torch.zeros(x.shape[0], sum(parts), dtype=dtype)
            timed = {name: _bound(way, y) for name, way in ways.items()}
            rows.append(Row(traffic.name, layer, interleaved_us(timed, repeats=repeats, calls=10)))
    return rows


def _rounded(factors: Factors, dtype: torch.dtype) -> Factors:
    return Factors(factors.a.to(dtype), factors.b.to(dtype))


def _bound(way: Callable[[torch.Tensor], None], y: torch.Tensor) -> Callable[[], None]:
    return lambda: way(y)


def _ways(
    backend_name: str, slots: dict[int, list[Factors]], x: torch.Tensor, plan: SegmentPlan
) -> dict[str, Callable[[torch.Tensor], None]]:
    backend = choose_lora(backend_name, CPU)
    table = _table(backend, slots, x)
    prepared = backend.prepare(plan)
    return {
        backend.name: lambda y: table.add_(y, x, prepared),
        "segment loop": lambda y: _segment_loop(y, x, plan, slots),
        "adapter loop (PEFT)": lambda y: _adapter_loop(y, x, plan, slots),
    }


def _table(backend: LoraBackend, slots: dict[int, list[Factors]], x: torch.Tensor) -> LoraTable:
    sizes = tuple(part.b.shape[0] for part in slots[0])
    table = backend.new_table(x.shape[1], sizes, dtype=x.dtype, device=CPU, max_bytes=MAX_BYTES)
    for slot, parts in slots.items():
        table.write(slot, table.pack(SlotDelta(tuple(PartDelta(part) for part in parts))))
    return table


def _segment_loop(y: torch.Tensor, x: torch.Tensor, plan: SegmentPlan, slots: dict[int, list[Factors]]) -> None:
    for segment in plan.segments:
        rows, first = slice(segment.start, segment.stop), 0
        for part in slots[segment.terms[0].slot]:
            y[rows, first : first + part.b.shape[0]].addmm_(x[rows] @ part.a.T, part.b.T)
            first += part.b.shape[0]


def _adapter_loop(y: torch.Tensor, x: torch.Tensor, plan: SegmentPlan, slots: dict[int, list[Factors]]) -> None:
    """Each projection on its own, rows gathered by index and added back by index, as PEFT's mixed batch does."""
    linear = torch.nn.functional.linear
    for slot in dict.fromkeys(segment.terms[0].slot for segment in plan.segments):
        rows = [row for s in plan.segments if s.terms[0].slot == slot for row in range(s.start, s.stop)]
        first = 0
        for part in slots[slot]:
            columns = slice(first, first + part.b.shape[0])
            y[rows, columns] += linear(linear(x[rows], part.a), part.b)
            first = columns.stop


def _check(
    ways: dict[str, Callable[[torch.Tensor], None]],
    slots: dict[int, list[Factors]],
    x: torch.Tensor,
    plan: SegmentPlan,
) -> None:
    reference = choose_lora("reference", CPU)
    width = sum(part.b.shape[0] for part in slots[0])
    expected = torch.zeros(x.shape[0], width, dtype=x.dtype)
    table = _table(reference, slots, x)
    table.add_(expected, x, reference.prepare(plan))
    for name, way in ways.items():
        got = torch.zeros_like(expected)
        way(got)
        excess = worst_excess(got, expected, x.dtype)
        if excess > 1:
            raise WrongResult(f"{name} is {excess:.1f} times the tolerance away from the reference")
