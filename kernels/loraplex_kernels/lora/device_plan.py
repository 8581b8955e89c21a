"""A step's segments as metadata that kernels read: written once a step, shared by all tables."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from loraplex_kernels.lora.device_layout import COUNT_WORDS, PAIR_WORDS, TILE_WORDS, Form
from loraplex_kernels.lora.device_table import DeviceSide
from loraplex_kernels.segments import Segment, SegmentPlan, Term

Words = np.ndarray[tuple[int, ...], np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class Metadata:
    """The words of one step, and how much of the shared scratch it needs."""

    words: Words
    num_tiles: int
    num_visits: int
    """Row tiles and gaps."""
    num_pairs: int
    num_h_rows: int


def describe(plan: SegmentPlan, num_rows: int, block_m: int) -> Metadata:
    """The metadata of ``plan`` in a step of ``num_rows`` rows, the last of which may be in no plan at all."""
    tiles: list[tuple[int, int, int, int]] = []
    gaps: list[tuple[int, int, int, int]] = []
    pairs: list[tuple[int, int, int, int, int]] = []
    weights: list[float] = []
    row = num_h_rows = 0
    for segment in plan.segments:
        gaps += [(first, count, 0, 0) for first, count in _blocks(row, segment.start, block_m)]
        row = segment.stop
        for first, count in _blocks(segment.start, segment.stop, block_m):
            tiles.append((first, count, len(pairs), len(segment.terms)))
            for term in segment.terms:
                pairs.append((first, count, term.slot, 0, num_h_rows))
                weights.append(term.weight)
                num_h_rows += count
    gaps += [(first, count, 0, 0) for first, count in _blocks(row, num_rows, block_m)]
    visits = len(tiles) + len(gaps)
    pairs_at = COUNT_WORDS + TILE_WORDS * visits
    words = np.zeros(pairs_at + PAIR_WORDS * len(pairs), dtype=np.int32)
    words[:5] = len(tiles), len(pairs), pairs_at, num_h_rows, visits
    words[COUNT_WORDS:pairs_at].reshape(visits, TILE_WORDS)[:] = np.array(tiles + gaps).reshape(visits, TILE_WORDS)
    if pairs:
        pair_words = words[pairs_at:].reshape(len(pairs), PAIR_WORDS)
        pair_words[:, :5] = pairs
        pair_words[:, 3] = np.array(weights, dtype=np.float32).view(np.int32)
    return Metadata(words, len(tiles), visits, len(pairs), num_h_rows)


def _blocks(start: int, stop: int, block_m: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, block_m):
        yield first, min(block_m, stop - first)


class DevicePlan:
    """A step's plan on the device. Tables only read it."""

    __slots__ = ("form", "max_pairs", "max_tiles", "max_visits", "meta", "segments", "slots")

    def __init__(self, segments: SegmentPlan, form: Form, meta: torch.Tensor, limits: tuple[int, int, int]) -> None:
        """``limits``: how many row tiles, pairs, and tiles and gaps ``meta`` may ever hold; a launch needs no more."""
        self.segments = segments
        self.form = form
        self.meta = meta  # int32
        self.max_tiles, self.max_pairs, self.max_visits = limits
        self.slots = slots_of(segments)

    @property
    def may_skip(self) -> bool:
        """Whether a table that holds nothing for ``slots`` need not launch."""
        return True

    def scales_input(self, scaling: Collection[int]) -> bool:
        """Whether a table of which the slots ``scaling`` scale their input launches for that."""
        return not self.slots.isdisjoint(scaling)


def slots_of(plan: SegmentPlan) -> frozenset[int]:
    """The slots that a plan names."""
    return frozenset(term.slot for segment in plan.segments for term in segment.terms)


class PlanWriter:
    """Puts plans on the device and sees to it that all they name is there."""

    def __init__(self, side: DeviceSide, planes: dict[Form, int]) -> None:
        """``planes``: the most planes of h of any table, by form; its owner keeps it current."""
        self._side = side
        self._planes = planes

    def make_ready(self, plan: SegmentPlan) -> frozenset[int]:
        """The slots of a plan, all of them settled. Raises ValueError naming one that holds nothing anywhere."""
        self._side.book.check(plan)
        slots = slots_of(plan)
        for table in list(self._side.unsettled):
            table.settle(slots, arrived=True)
        return slots

    def write(self, described: Metadata, form: Form, target: torch.Tensor | None = None) -> torch.Tensor:
        """Put metadata into the beginning of ``target``, or new memory. Raises MemoryError."""
        self._side.scratch.reserve_step(self._planes[form] * described.num_h_rows, described.num_pairs)
        nbytes = described.words.nbytes
        meta = self._side.queue.allocate(nbytes).view(torch.int32) if target is None else target
        source = self._side.queue.host(nbytes).view(torch.int32)
        source.copy_(torch.from_numpy(described.words))
        self._side.queue.put(meta[: len(described.words)], source)
        return meta

    def allocate(self, num_words: int) -> torch.Tensor:
        """Memory of a static plan."""
        return self._side.queue.allocate(4 * num_words).view(torch.int32)


#: graph keys of plans with adapters: none of them scales its input anywhere, or one does somewhere
PLAIN: Final = "plain"
SCALED: Final = "scaled inputs"


class _ScalingPlan(DevicePlan):
    """A static plan for layers that always scale: which slots do at which table is seen on the device, and a step that
    has one of them costs a launch at each layer, whatever else was captured."""

    __slots__ = ()

    @property
    def may_skip(self) -> bool:
        return False

    def scales_input(self, scaling: Collection[int]) -> bool:
        return True


class StaticDevicePlan(DevicePlan):
    """A plan whose memory stays where it is. Its segments always span ``max_rows`` rows, as the captured layers do."""

    __slots__ = ("_max_rows", "_max_terms", "_plan", "_scaling", "_writer")

    def __init__(self, max_rows: int, max_terms: int, form: Form, writer: PlanWriter) -> None:
        self._max_rows = max_rows
        self._max_terms = max_terms
        self._writer = writer
        nothing = SegmentPlan(max_rows, ())
        max_pairs = max_terms * -(-max_rows // form.block_m)
        meta = writer.allocate(COUNT_WORDS + TILE_WORDS * max_rows + PAIR_WORDS * max_pairs)
        limits = max_rows, max_pairs, max_rows
        super().__init__(nothing, form, meta, limits)
        self._scaling = _ScalingPlan(nothing, form, meta, limits)
        self._write(nothing)

    @property
    def keys(self) -> tuple[Hashable, ...]:
        return (PLAIN, SCALED)

    def capturing(self, key: Hashable) -> DevicePlan:
        return self._scaling if key == SCALED else self

    def set(self, plan: SegmentPlan) -> bool:
        num_terms = sum(len(segment.terms) for segment in plan.segments)
        if plan.num_rows > self._max_rows or num_terms > self._max_terms:
            return False
        slots = self._writer.make_ready(plan)
        if plan != self._plan:  # decodes repeat theirs for many steps
            self._write(plan)
        self.slots = self._scaling.slots = slots
        return True

    @property
    def may_skip(self) -> bool:
        return False

    def scales_input(self, scaling: Collection[int]) -> bool:
        return False

    def _write(self, plan: SegmentPlan) -> None:
        self._writer.write(describe(plan, self._max_rows, self.form.block_m), self.form, self.meta)
        stand_in = (Segment(0, 1, (Term(0),)),)
        self.segments = self._scaling.segments = SegmentPlan(self._max_rows, plan.segments or stand_in)
        self._plan = plan
