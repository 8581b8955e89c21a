"""Which rows of a step belong to which adapters. Plain Python values; backends turn them into tensors once a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Term:
    """One weighted adapter of a segment: the slot it lives in and the request's coefficient for it."""

    slot: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows ``start:stop`` (stop > start) that all use the same terms (at least one)."""

    start: int
    stop: int
    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """The segments of one step, in row order and disjoint; rows in no segment are base-only."""

    num_rows: int
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        end = 0
        for segment in self.segments:
            if not (end <= segment.start < segment.stop <= self.num_rows) or not segment.terms:
                raise ValueError(
                    f"segment {segment.start}:{segment.stop} with {len(segment.terms)} terms is out of order, empty or "
                    f"outside the {self.num_rows} rows of the step (the last one ended at {end})"
                )
            end = segment.stop


def plan_rows(row_terms: Iterable[tuple[int, tuple[Term, ...]]]) -> SegmentPlan:
    """Build a plan from ``(num_rows, terms)`` runs in row order; equal neighbours join, empty terms are base-only."""
    segments: list[Segment] = []
    row = 0
    for count, terms in row_terms:
        if count and terms:
            if segments and segments[-1].stop == row and segments[-1].terms == terms:
                segments[-1] = Segment(segments[-1].start, row + count, terms)
            else:
                segments.append(Segment(row, row + count, terms))
        row += count
    return SegmentPlan(row, tuple(segments))
