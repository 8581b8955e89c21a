"""What op tests and op benchmarks share: tolerances, popularity distributions, deltas, the formula, poison.

Knows the contracts, no backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from loraplex_kernels.lora import Factors, PartDelta, SlotDelta
from loraplex_kernels.segments import SegmentPlan, Term, plan_rows

#: how requests pick adapters: all the same, each its own, uniformly, by Zipf 1.5, or none at all
POPULARITIES = ("identical", "distinct", "uniform", "skewed", "empty")

#: largest ranks and smallest, and some that no tile divides
MIXED_RANKS = (1, 4, 8, 13, 16, 32, 64, 128)

ZIPF_EXPONENT = 1.5


@dataclass(frozen=True, slots=True)
class Tolerance:
    """``|got - expected| <= absolute + relative * max|expected|`` for every element, against a float64 formula.

    Relative to the largest element, because a low-rank product's error grows with its intermediate sums, not with
    what is left of them after they cancel.
    """

    relative: float
    absolute: float


#: about eight roundings of the dtype (bf16 attention scores are rounded before their softmax)
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(2e-6, 1e-6),
    torch.bfloat16: Tolerance(1.6e-2, 1e-3),
    torch.float16: Tolerance(2e-3, 1e-4),
}


def worst_excess(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest error as a multiple of what ``dtype`` allows; at most 1 passes, NaN and inf never do."""
    if not expected.numel():
        return 0.0
    tolerance = TOLERANCES[dtype]
    allowed = tolerance.absolute + tolerance.relative * float(expected.double().abs().max())
    excess = float((got.double() - expected.double()).abs().max()) / allowed
    return excess if excess == excess else float("inf")


def popularity_slots(
    popularity: str, num_requests: int, num_slots: int, generator: torch.Generator
) -> list[int | None]:
    """The slot of every request, sorted as a scheduler sorts them; None is base-only. One of POPULARITIES."""
    if popularity == "empty":
        return [None] * num_requests
    if popularity == "identical":
        return [0] * num_requests
    if popularity == "distinct":
        return [request % num_slots for request in range(num_requests)]
    if popularity == "uniform":
        weights = torch.ones(num_slots)
    elif popularity == "skewed":
        weights = torch.arange(1, num_slots + 1).float() ** -ZIPF_EXPONENT
    else:
        raise ValueError(f"popularity {popularity!r}, must be one of {', '.join(POPULARITIES)}")
    drawn = torch.multinomial(weights, num_requests, replacement=True, generator=generator)
    return sorted(drawn.tolist())


def decode_plan(slots: Sequence[int | None]) -> SegmentPlan:
    """One row for each request."""
    return plan_rows((1, () if slot is None else (Term(slot),)) for slot in slots)


def mixed_plan(slots: Sequence[int | None], chunk: int) -> SegmentPlan:
    """A decode row for each request but the last two, then ``chunk`` prefill rows for each of those."""
    terms = [() if slot is None else (Term(slot),) for slot in slots]
    return plan_rows([*((1, term) for term in terms[:-2]), *((chunk, term) for term in terms[-2:])])


def random_factors(rank: int, in_features: int, out_features: int, generator: torch.Generator) -> Factors:
    """A float32 pair whose product with a unit-variance row has about unit variance."""
    a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
    b = torch.randn(out_features, rank, generator=generator) / rank**0.5
    return Factors(a, b)


def random_scale(size: int, generator: torch.Generator) -> torch.Tensor:
    """A float32 vector around 1, some of it negative."""
    return 1 + 0.7 * torch.randn(size, generator=generator)


def mixed_slots(
    num_slots: int, in_features: int, parts: Sequence[int], dtype: torch.dtype, generator: torch.Generator
) -> dict[int, SlotDelta]:
    """Factors of mixed ranks, over slots and within a slot, rounded to ``dtype``, and a part missing here and there."""
    slots: dict[int, SlotDelta] = {}
    for slot in range(num_slots):
        made: list[PartDelta | None] = []
        for index, size in enumerate(parts):
            rank = MIXED_RANKS[(slot + (index if slot % 3 == 2 else 0)) % len(MIXED_RANKS)]
            a, b = random_factors(rank, in_features, size, generator)
            absent = slot % 4 == 3 and index == 1
            made.append(None if absent else PartDelta(Factors(a.to(dtype), b.to(dtype))))
        slots[slot] = SlotDelta(tuple(made))
    return slots


def expected_input(x: torch.Tensor, plan: SegmentPlan, slots: Mapping[int, SlotDelta]) -> torch.Tensor:
    """x' of the contract, in float64; slots that are not in ``slots`` hold nothing."""
    expected = x.double().clone()
    for segment in plan.segments:
        factor = torch.ones(x.shape[1], dtype=torch.float64)
        for term in segment.terms:
            if term.slot in slots and (in_scale := slots[term.slot].in_scale) is not None:
                factor += term.weight * (in_scale.double() - 1)
        expected[segment.start : segment.stop] *= factor
    return expected


def expected_output(
    y: torch.Tensor, x: torch.Tensor, plan: SegmentPlan, slots: Mapping[int, SlotDelta], parts: Sequence[int]
) -> torch.Tensor:
    """What ``add_`` makes of y, in float64; x is ``[T, in]`` (one-hot for the embedding form)."""
    base = y.double()
    expected = base.clone()
    for segment in plan.segments:
        rows = slice(segment.start, segment.stop)
        for term in segment.terms:
            first = 0
            held = slots[term.slot].parts if term.slot in slots else (None,) * len(parts)
            for part, size in zip(held, parts, strict=True):
                columns = slice(first, first + size)
                factors, out_scale, shift = part or PartDelta()
                if factors is not None:
                    product = x[rows].double() @ factors.a.double().T @ factors.b.double().T
                    expected[rows, columns] += term.weight * product
                if out_scale is not None:
                    expected[rows, columns] += term.weight * (out_scale.double() - 1) * base[rows, columns]
                if shift is not None:
                    expected[rows, columns] += term.weight * shift.double()
                first += size
    return expected


def poison_(tensor: torch.Tensor, rows: slice, value: float = float("nan")) -> torch.Tensor:
    """Fill ``rows`` with NaN, inf or a huge value. A test then asks that all other rows stay as they were."""
    tensor[rows] = value
    return tensor
