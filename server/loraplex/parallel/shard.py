"""How matrices are cut over a group of ranks: pure arithmetic on sizes, no tensor in sight."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import gcd
from typing import Final

from loraplex.errors import UnsupportedFeature

#: group sizes that a refusal looks at for some that would do
_LARGEST_GROUP: Final = 64

Runs = tuple[slice, ...]
"""Outputs of a matrix, in the order in which a rank has them: usually one slice, all with both ends set. Slices may
overlap: what several of a rank's units need may be there once for each."""


class Shard(enum.Enum):
    """What a matrix ``[out, in]`` is cut along: nothing, its outputs, or its inputs."""

    REPLICATED = "replicated"
    COLUMN = "column"
    ROW = "row"


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank holds of a matrix ``[out, in]``: outputs ``rows`` and inputs ``cols``.

    ``leads``: it is the one that holds what there must be once: biases of ``Shard.ROW``, and tokens past the
    vocabulary.
    """

    shard: Shard
    rows: Runs
    cols: slice
    leads: bool = True


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive outputs of a matrix that are cut by themselves: ``features`` of them, in ``pieces`` equal pieces.
    ``name`` is for people."""

    features: int
    pieces: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a matrix may be cut: along ``shard``, between ``pieces`` equal units, which ``what`` counts (a name in
    config.json).

    ``shared``: where ranks outnumber the units, several may hold the same one.

    ``stretches``, of outputs, where a matrix is several that lie below each other. Units then are what ranks share out
    (heads), and a stretch has fewer pieces where several units have one in common (groups): each piece is of as many
    consecutive units. A rank has, for its units in order, a piece for every run of them that fits into both its share
    and a piece's units: block k of so many units finds its piece as piece k, which may be there twice, and on several
    ranks.
    """

    shard: Shard = Shard.REPLICATED
    pieces: int = 1
    what: str = ""
    shared: bool = False
    stretches: tuple[Stretch, ...] = ()

    def __post_init__(self) -> None:
        assert not self.stretches or self.shard is Shard.COLUMN, "stretches are of outputs"
        assert all(self.pieces % one.pieces == 0 and one.features % one.pieces == 0 for one in self.stretches)

    def fits(self, size: int) -> bool:
        """Whether a group of ``size`` ranks can share the matrix."""
        if self.shard is Shard.REPLICATED:
            return True
        return self.pieces % size == 0 or (self.shared and size % self.pieces == 0)

    def part(self, out_features: int, in_features: int, rank: int, size: int) -> Part:
        """What ``rank`` of ``size`` holds of ``[out_features, in_features]``.

        Raises UnsupportedFeature naming what ``size`` does not divide.
        """
        rows: Runs = (slice(0, out_features),)
        cols = slice(0, in_features)
        if self.shard is Shard.COLUMN:
            rows = _merged(itertools.chain.from_iterable(self._runs(out_features, rank, size)))
        elif self.shard is Shard.ROW:
            ((cols,),) = self._runs(in_features, rank, size)
        return Part(self.shard, rows, cols, leads=rank == 0)

    def _runs(self, features: int, rank: int, size: int) -> Iterator[Runs]:
        """What a rank has of each stretch; all of the features are one, where there are no others."""
        check_group(size, (self,))
        units = max(self.pieces // size, 1)
        first, begin = rank * self.pieces // size, 0
        for stretch in self.stretches or (Stretch(features, self.pieces),):
            width, shared_by = stretch.features // stretch.pieces, self.pieces // stretch.pieces
            if shared_by == 1:  # as many as there are tokens in a vocabulary, and one run
                yield (slice(begin + first * width, begin + (first + units) * width),)
            else:
                held = (unit // shared_by for unit in range(first, first + units, gcd(units, shared_by)))
                yield tuple(slice(begin + piece * width, begin + (piece + 1) * width) for piece in held)
            begin += stretch.features
        assert begin == features, "the stretches are not the matrix"


#: of what every rank holds whole
REPLICATED: Final = Cut()


def check_group(size: int, cuts: Iterable[Cut]) -> None:
    """Raises UnsupportedFeature: a group of ``size`` ranks does not fit all of these; names what it does not divide,
    and the sizes that would do."""
    cuts = tuple(dict.fromkeys(cuts))
    wrong = [f"{cut.what} = {cut.pieces}" for cut in cuts if not cut.fits(size)]
    if wrong:
        fitting = [str(n) for n in range(1, _LARGEST_GROUP + 1) if all(cut.fits(n) for cut in cuts)]
        raise UnsupportedFeature(
            f"tensor_parallel_size {size} does not divide {', '.join(dict.fromkeys(wrong))}; sizes that fit are "
            f"{', '.join(fitting)}",
            field="tensor_parallel_size",
        )


def length(part: slice | Runs) -> int:
    """How many rows or columns a slice with both ends set holds, or several hold together."""
    if isinstance(part, slice):
        return int(part.stop) - int(part.start)
    return sum(length(run) for run in part)


def _merged(runs: Iterable[slice]) -> Runs:
    """The same rows in the same order, in as few slices as there can be."""
    found: list[slice] = []
    for run in runs:
        if found and found[-1].stop == run.start:
            found[-1] = slice(found[-1].start, run.stop)
        else:
            found.append(run)
    return tuple(found)
