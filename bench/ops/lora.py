"""The lora op at one model's packed layers: backends beside plain torch formulations of the same product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bench.limits.shapes import PackedLayer
from bench.ops.lora_formulations import FORMULATIONS
from bench.ops.options import Options
from bench.ops.report import Report, Row, report
from bench.ops.shapes import Traffic
from bench.ops.timing import Stopwatch, Way, WrongResult, measure, num_sets, stopwatch_for
from loraplex_kernels.backend import choose_lora
from loraplex_kernels.lora import Factors, LoraBackend, LoraTable, PartDelta, SlotDelta, StepPlan
from loraplex_kernels.segments import Segment, SegmentPlan, Term
from loraplex_kernels.testing import random_factors, worst_excess

MAX_BYTES = 1 << 36


@dataclass(frozen=True, slots=True)
class Case:
    """One traffic at one layer: factors of its slots, an input, and what is in the output before."""

    options: Options
    traffic: Traffic
    layer: PackedLayer
    slots: tuple[tuple[Factors, ...], ...]
    x: torch.Tensor  # [T, in]
    y: torch.Tensor  # [T, sum(part_sizes)]

    @property
    def num_bytes(self) -> int:
        """Factors of each used slot, x, and the adapted rows of y read and written."""
        used = {term.slot for segment in self.traffic.plan.segments for term in segment.terms}
        factors = sum(tensor.nbytes for slot in used for part in self.slots[slot] for tensor in part)
        adapted = sum(segment.stop - segment.start for segment in self.traffic.plan.segments)
        return factors + adapted * (self.x[:1].nbytes + 2 * self.y[:1].nbytes)


#: makes a backend that has no tables yet
Make = Callable[[], LoraBackend]


def run(options: Options, stopwatch: Stopwatch | None = None, made: Mapping[str, Make] | None = None) -> Report:
    """Time every layer under every traffic. Raises WrongResult before it reports the time of a wrong way.

    ``made``: backends of the caller's making, by the name of their column, in place of those of the options and of
    the torch formulations. Raises ValueError for a backend that cannot run on the device.
    """
    stopwatch = stopwatch or stopwatch_for(options.device)
    backends = _chosen(options) if made is None else made
    formulations = FORMULATIONS if made is None else {}
    generator = torch.Generator().manual_seed(0)
    rows = []
    for traffic in options.shapes.traffics:
        for layer in options.shapes.model.packed_layers:
            case = _case(options, traffic, layer, generator)
            expected = _expected(case)
            sets = num_sets(stopwatch, case.num_bytes)
            ways = [_backend_way(case, (name, make()), sets, expected) for name, make in backends.items()]
            ways += [_plain_way(case, name, sets, expected) for name in formulations]
            timings = measure(ways, stopwatch, repeats=options.repeats, calls=options.calls)
            rows.append(Row(traffic.name, layer.name, case.num_bytes, sets, timings))
    return report("lora", options, stopwatch.copy_bytes_per_s(), tuple(rows))


def _chosen(options: Options) -> dict[str, Make]:
    names = [choose_lora(name, options.device).name for name in options.backends]
    return {name: partial(choose_lora, name, options.device) for name in names}


def _case(options: Options, traffic: Traffic, layer: PackedLayer, generator: torch.Generator) -> Case:
    ranks = options.shapes.ranks

    def factors(slot: int, size: int) -> Factors:
        made = random_factors(ranks[slot % len(ranks)], layer.in_features, size, generator)
        return Factors(*(tensor.to(options.dtype) for tensor in made))

    slots = tuple(tuple(factors(slot, size) for size in layer.part_sizes) for slot in range(traffic.num_slots))
    x, y = (
        torch.randn(traffic.plan.num_rows, size, generator=generator).to(options.device, options.dtype)
        for size in (layer.in_features, layer.out_features)
    )
    return Case(options, traffic, layer, slots, x, y)


def _expected(case: Case) -> torch.Tensor:
    reference = choose_lora("reference", case.options.device)
    table = _filled(case, reference, sets=1)
    y = case.y.clone()
    table.add_(y, case.x, reference.prepare(case.traffic.plan))
    return y


def _backend_way(case: Case, named: tuple[str, LoraBackend], sets: int, expected: torch.Tensor) -> Way:
    """One table holds the slots of all sets, so that each set's plan reads other memory.

    A decode step's plans are static ones where the backend has them, as in a server, so that launches can be replayed.
    """
    name, backend = named
    table = _filled(case, backend, sets)
    plans = [
        _step_plan(backend, _moved(case.traffic.plan, index * case.traffic.num_slots), case.traffic)
        for index in range(sets)
    ]
    calls = tuple(_checked(case, name, partial(_add, table, plan), expected) for plan, _ in plans)
    return Way(name, calls, capturable=all(static for _, static in plans))


def _step_plan(backend: LoraBackend, plan: SegmentPlan, traffic: Traffic) -> tuple[StepPlan, bool]:
    """The plan made ready, and whether launches that read it can be captured."""
    num_terms = sum(len(segment.terms) for segment in plan.segments)
    static = backend.static_plan(plan.num_rows, num_terms) if traffic.is_decode else None
    if static is None or not static.set(plan):
        return backend.prepare(plan), False
    return static, True


def _plain_way(case: Case, name: str, sets: int, expected: torch.Tensor) -> Way:
    make = FORMULATIONS[name]
    device = case.options.device
    calls = []
    for _ in range(sets):
        slots = [[Factors(*(t.to(device, copy=True) for t in part)) for part in parts] for parts in case.slots]
        calls.append(_checked(case, name, make(case.traffic.plan, slots), expected))
    return Way(name, tuple(calls), capturable=True)


def _add(table: LoraTable, plan: StepPlan, y: torch.Tensor, x: torch.Tensor) -> None:
    table.add_(y, x, plan)


def _checked(
    case: Case, name: str, add: Callable[[torch.Tensor, torch.Tensor], None], expected: torch.Tensor
) -> Callable[[], None]:
    """The call to time, on rows of its own. Raises WrongResult when it is not what the reference computes."""
    x, y = case.x.clone(), case.y.clone()
    add(y, x)
    excess = worst_excess(y, expected, x.dtype)
    if excess > 1:
        raise WrongResult(
            f"{name}, {case.traffic.name}, {case.layer.name}: {excess:.1f} times the tolerance away from the reference"
        )
    return partial(add, y, x)


def _filled(case: Case, backend: LoraBackend, sets: int) -> LoraTable:
    """A table in which slot ``s`` of the case lies once for each set, ``num_slots`` apart, in other memory."""
    layer, options = case.layer, case.options
    table = backend.new_table(
        layer.in_features, layer.part_sizes, dtype=options.dtype, device=options.device, max_bytes=MAX_BYTES
    )
    for slot, parts in enumerate(case.slots):
        packed = table.pack(SlotDelta(tuple(PartDelta(part) for part in parts)))
        for index in range(sets):
            table.write(index * case.traffic.num_slots + slot, packed)
    return table


def _moved(plan: SegmentPlan, by: int) -> SegmentPlan:
    def moved(terms: Sequence[Term]) -> tuple[Term, ...]:
        return tuple(Term(term.slot + by, term.weight) for term in terms)

    return SegmentPlan(plan.num_rows, tuple(Segment(s.start, s.stop, moved(s.terms)) for s in plan.segments))
