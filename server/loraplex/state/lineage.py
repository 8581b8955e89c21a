"""What decides the content of a sequence's pages beside its tokens: which adapters are on, and from where.

Knows no page. An adapter is a hashable key here: its content digest and weight.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

Mark = tuple[int, Hashable]
"""A position, and the key of what is on from there to the end of the sequence."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """``marks`` in an order that is the same for equal lineages; none: the base model alone.

    What is cached of a token depends on the tokens up to it and on the marks up to it, and on nothing else. So two
    sequences of different lineages share pages as long as their tokens are equal and no mark has been passed.
    """

    marks: tuple[Mark, ...] = ()
    #: position of the last mark, -1 without any: behind it there is nothing to look for
    last: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "last", max((position for position, _ in self.marks), default=-1))

    @staticmethod
    def of(key: Hashable) -> Lineage:
        """Of something that is on from the first token."""
        return Lineage(((0, key),))

    def begun(self, start: int, stop: int) -> tuple[Mark, ...]:
        """The marks at positions ``start`` to ``stop - 1``."""
        return () if start > self.last else tuple(mark for mark in self.marks if start <= mark[0] < stop)
