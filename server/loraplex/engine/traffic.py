"""Whose traffic it is: the share of the steps that each adapter has to itself, over the last seconds.

Pure Python, with a clock that is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final

from loraplex.engine.sequence import Sequence

#: seconds after which what was counts for 1/e of what is
_MEMORY_S: Final = 5.0
#: of a pause in which nothing ran, no more than this counts
_LONGEST_S: Final = 0.5
#: a share below this is forgotten
_LEAST: Final = 0.01


class TrafficShares:
    """Exponentially weighted in time. Owner: the engine loop. ``clock`` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last_s = clock()
        self._shares: dict[str, float] = {}

    def observe(self, running: Iterable[Sequence]) -> None:
        """A step ran these. Nothing running leaves all shares as they are."""
        now = self._clock()
        elapsed, self._last_s = min(now - self._last_s, _LONGEST_S), now
        contents = {sequence.uses.alone for sequence in running}
        if not contents:
            return
        kept = math.exp(-elapsed / _MEMORY_S)
        then = {uid: share * kept for uid, share in self._shares.items()}
        if len(contents) == 1:
            (uid,) = contents
            then[uid] = then.get(uid, 0.0) + 1 - kept
        self._shares = {uid: share for uid, share in then.items() if share >= _LEAST}

    def of(self, uid: str) -> float:
        """The share of steps all of whose requests use this content alone, with weight 1."""
        return self._shares.get(uid, 0.0)

    def above(self, share: float) -> list[str]:
        """Contents that have more than ``share``."""
        return [uid for uid, own in self._shares.items() if uid and own > share]
