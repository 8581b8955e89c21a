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
    """What a block keeps of its stacked product. Selected, never multiplied away: a neighbour's inf stays out."""

    hidden: torch.Tensor  # [n, 1, T] bool, True where row t has no term in stacked row n
    weights: torch.Tensor | None  # [n, 1, T] float32; None when all are 1


class CpuStepPlan:
    """A SegmentPlan with what its tables have in common, made when the first table asks and kept for the rest."""

    def __init__(self, segments: SegmentPlan) -> None:
        self.segments = segments
        self.slots = tuple(dict.fromkeys(term.slot for segment in segments.segments for term in segment.terms))
        self._schedules: dict[tuple[tuple[int, ...], int], Schedule] = {}
        self._selections: dict[tuple[Block, tuple[tuple[int, int], ...], int], Selection] = {}

    def schedule(self, ranks: tuple[int, ...], limit: int) -> Schedule:
        """The step's work where ``slots[i]`` has rank ``ranks[i]`` (0: nothing).

        A segment joins the block before it while the multiplications of rows with ranks that are not theirs, which
        the block then does in vain, stay at or below ``limit``.
        """
        key = (ranks, limit)
        schedule = self._schedules.get(key)
        if schedule is None:
            schedule = self._cut(dict(zip(self.slots, ranks, strict=True)), limit)
            self._schedules[key] = schedule
        return schedule

    def selection(self, block: Block, rows: tuple[tuple[int, int], ...], num_rows: int) -> Selection:
        """What ``block`` keeps when ``block.slots[i]`` lies in stacked rows ``rows[i]`` of ``num_rows``."""
        key = (block, rows, num_rows)
        selection = self._selections.get(key)
        if selection is None:
            selection = _select(block, dict(zip(block.slots, rows, strict=True)), num_rows)
            self._selections[key] = selection
        return selection

    def _cut(self, ranks: dict[int, int], limit: int) -> Schedule:
        singles: list[Single] = []
        blocks: list[Block] = []
        members: list[Segment] = []
        slots: dict[int, int] = {}
        for whole in self.segments.segments:
            segment = Segment(whole.start, whole.stop, tuple(term for term in whole.terms if ranks[term.slot]))
            added = {term.slot: ranks[term.slot] for term in segment.terms if term.slot not in slots}
            if members:
                height = members[-1].stop - members[0].start
                wasted = (segment.stop - segment.start) * sum(slots.values()) + height * sum(added.values())
                if segment.start != members[-1].stop or not segment.terms or wasted > limit:
                    _close(members, slots, singles, blocks)
                    members, slots = [], {}
                    added = {term.slot: ranks[term.slot] for term in segment.terms}
            if segment.terms:
                members.append(segment)
                slots |= added
        _close(members, slots, singles, blocks)
        return Schedule(tuple(singles), tuple(blocks))


def _close(members: list[Segment], slots: dict[int, int], singles: list[Single], blocks: list[Block]) -> None:
    """Turn the gathered segments into a block, or into a single when they are one product."""
    if len(members) == 1 and len(members[0].terms) == 1:
        singles.append(Single(members[0].start, members[0].stop, members[0].terms[0]))
    elif members:
        blocks.append(Block(members[0].start, members[-1].stop, tuple(members), tuple(slots)))


def _select(block: Block, rows: dict[int, tuple[int, int]], num_rows: int) -> Selection:
    weights = np.zeros((num_rows, 1, block.stop - block.start), dtype=np.float32)
    hidden = np.ones(weights.shape, dtype=np.bool_)
    weighted = False
    for segment in block.segments:
        columns = slice(segment.start - block.start, segment.stop - block.start)
        for term in segment.terms:
            first, last = rows[term.slot]
            hidden[first:last, 0, columns] = False
            weights[first:last, 0, columns] += term.weight
        weighted = weighted or len(segment.terms) > 1 or segment.terms[0].weight != 1.0
    return Selection(torch.from_numpy(hidden), torch.from_numpy(weights) if weighted else None)
