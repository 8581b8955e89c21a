"""How matrices are cut over a group of ranks: pure arithmetic on sizes, no tensor in sight."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from loraplex.errors import UnsupportedFeature

#: group sizes that a refusal looks at for some that would do
_LARGEST_GROUP: Final = 64


class Shard(enum.Enum):
    """What a matrix ``[out, in]`` is cut along: nothing, its outputs, or its inputs."""

    REPLICATED = "replicated"
    COLUMN = "column"
    ROW = "row"


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank holds of a matrix ``[out, in]``: outputs ``rows`` and inputs ``cols``, both ends set.

    ``leads``: it is the one that holds what there must be once: biases of ``Shard.ROW``, and tokens past the
    vocabulary.
    """

    shard: Shard
    rows: tuple[slice, ...]
    cols: slice
    leads: bool = True

    @property
    def num_rows(self) -> int:
        return sum(length(run) for run in self.rows)


@dataclass(frozen=True, slots=True)
class Stretch:
    features: int
    pieces: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a matrix may be cut: along ``shard``, between ``pieces`` equal runs, which ``what`` counts (a name in
    config.json).

    ``shared``: where ranks outnumber the pieces, several may hold the same one.
    """

    shard: Shard = Shard.REPLICATED
    pieces: int = 1
    what: str = ""
    shared: bool = False
    stretches: tuple[Stretch, ...] = ()

    def fits(self, size: int) -> bool:
        """Whether a group of ``size`` ranks can share the matrix."""
        if self.shard is Shard.REPLICATED:
            return True
        return self.pieces % size == 0 or (self.shared and size % self.pieces == 0)

    def part(self, out_features: int, in_features: int, rank: int, size: int) -> Part:
        """What ``rank`` of ``size`` holds of ``[out_features, in_features]``.

        Raises UnsupportedFeature naming what ``size`` does not divide.
        """
        rows, cols = slice(0, out_features), slice(0, in_features)
        if self.shard is Shard.COLUMN:
            rows = self._run(out_features, rank, size)
        elif self.shard is Shard.ROW:
            cols = self._run(in_features, rank, size)
        return Part(self.shard, (rows,), cols, leads=rank == 0)

    def _run(self, features: int, rank: int, size: int) -> slice:
        check_group(size, (self,))
        first = rank * self.pieces // size
        count = max(self.pieces // size, 1)
        width = features // self.pieces
        return slice(first * width, (first + count) * width)


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


def length(part: slice) -> int:
    """How many rows or columns a slice with both ends set holds."""
    return int(part.stop) - int(part.start)
