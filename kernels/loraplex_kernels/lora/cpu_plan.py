"""How the CPU backend cuts a step: which segments share one stacked product, and what that product must not mix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from loraplex_kernels.segments import Segment, SegmentPlan, Term


@dataclass(frozen=True, slots=True)
class Single:
    """Rows multiplied by one slot alone."""

    start: int
    stop: int
    term: Term


@dataclass(frozen=True, slots=True)
class Block:
    """Adjacent segments, rows ``start:stop``, multiplied by the stacked rows of all their slots at once."""

    start: int
    stop: int
    segments: tuple[Segment, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A step's work for tables that hold the same ranks."""

    singles: tuple[Single, ...]
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """What a block keeps of its stacked product h ``[n, parts, T]``.

    Kept by bits, never by multiplying: and-ing a neighbour's NaN or inf with no bits is 0. Also four times as fast as
    a boolean mask.
    """

    bits: torch.Tensor  # [n, parts, T] integers of h's item size: all bits where row t has a term in stacked row n
    weights: torch.Tensor | None  # [n, 1, T] float32; None when all are 1


@dataclass(frozen=True, slots=True)
class Layout:
    """How a table stacks a block: tables that agree in it share their selection."""

    rows: tuple[tuple[int, int], ...]  # of each of the block's slots
    num_rows: int
    num_parts: int
    itemsize: int


class CpuStepPlan:
    """A SegmentPlan with what its tables have in common, made when the first table asks and kept for the rest."""

    def __init__(self, segments: SegmentPlan) -> None:
        self.segments = segments
        self.slots = tuple(dict.fromkeys(term.slot for segment in segments.segments for term in segment.terms))
        self._schedules: dict[tuple[tuple[int, ...], int], Schedule] = {}
        self._selections: dict[tuple[Block, Layout], Selection] = {}

    def schedule(self, ranks: tuple[int, ...], limit: int) -> Schedule:
        """The step's work where ``slots[i]`` has rank ``ranks[i]`` (0: nothing).

        A segment joins the block before it while the multiplications of rows with ranks that are not theirs, all that
        the block does in vain, stay at or below ``limit``.
        """
        key = (ranks, limit)
        schedule = self._schedules.get(key)
        if schedule is None:
            schedule = self._cut(dict(zip(self.slots, ranks, strict=True)), limit)
            self._schedules[key] = schedule
        return schedule

    def selection(self, block: Block, layout: Layout) -> Selection:
        """What ``block`` keeps of its stacked product."""
        key = (block, layout)
        selection = self._selections.get(key)
        if selection is None:
            selection = _select(block, layout)
            self._selections[key] = selection
        return selection

    def _cut(self, ranks: dict[int, int], limit: int) -> Schedule:
        singles: list[Single] = []
        blocks: list[Block] = []
        members: list[Segment] = []
        slots: dict[int, int] = {}
        useful = 0
        for whole in self.segments.segments:
            segment = Segment(whole.start, whole.stop, tuple(term for term in whole.terms if ranks[term.slot]))
            added = {term.slot: ranks[term.slot] for term in segment.terms if term.slot not in slots}
            owned = (segment.stop - segment.start) * sum(ranks[term.slot] for term in segment.terms)
            if members:
                total = (segment.stop - members[0].start) * (sum(slots.values()) + sum(added.values()))
                if segment.start != members[-1].stop or not segment.terms or total - useful - owned > limit:
                    _close(members, slots, singles, blocks)
                    members, slots, useful = [], {}, 0
                    added = {term.slot: ranks[term.slot] for term in segment.terms}
            if segment.terms:
                members.append(segment)
                slots |= added
                useful += owned
        _close(members, slots, singles, blocks)
        return Schedule(tuple(singles), tuple(blocks))


def _close(members: list[Segment], slots: dict[int, int], singles: list[Single], blocks: list[Block]) -> None:
    """Turn the gathered segments into a block, or into a single when they are one product."""
    if len(members) == 1 and len(members[0].terms) == 1:
        singles.append(Single(members[0].start, members[0].stop, members[0].terms[0]))
    elif members:
        blocks.append(Block(members[0].start, members[-1].stop, tuple(members), tuple(slots)))


def _select(block: Block, layout: Layout) -> Selection:
    rows = dict(zip(block.slots, layout.rows, strict=True))
    shape = (layout.num_rows, layout.num_parts, block.stop - block.start)
    bits = np.zeros(shape, dtype=np.int32 if layout.itemsize == 4 else np.int16)
    weights = np.zeros((shape[0], 1, shape[2]), dtype=np.float32)
    weighted = False
    for segment in block.segments:
        columns = slice(segment.start - block.start, segment.stop - block.start)
        for term in segment.terms:
            first, last = rows[term.slot]
            bits[first:last, :, columns] = -1
            weights[first:last, 0, columns] += term.weight
        weighted = weighted or len(segment.terms) > 1 or segment.terms[0].weight != 1.0
    return Selection(torch.from_numpy(bits), torch.from_numpy(weights) if weighted else None)
