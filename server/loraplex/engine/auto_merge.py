"""When an adapter that nobody asked to be merged is: by its share of the steps, with hysteresis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final

from loraplex.engine.sequence import Sequence
from loraplex.engine.traffic import TrafficShares

#: a share above this is worth a merged form, one below that is not: a few seconds of either, as shares are counted
_HOT: Final = 0.6
_COLD: Final = 0.3
#: seconds between two looks, and until one that failed is tried again
_LOOK_S: Final = 0.5
_PAUSE_S: Final = 60.0


class AutoMerge:
    """The policy. Owner: the engine loop. ``clock`` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float], *, on: bool) -> None:
        """Not ``on``: it wants nothing, and counts nothing."""
        self._clock = clock
        self._on = on
        self._shares = TrafficShares(clock)
        self._next_look_s = clock()
        self._not_before: dict[str, float] = {}

    @property
    def is_due(self) -> bool:
        """Whether it is time for another look; the next one is later."""
        now = self._clock()
        if not self._on or now < self._next_look_s:
            return False
        self._next_look_s = now + _LOOK_S
        return True

    def observe(self, running: Iterable[Sequence]) -> None:
        """A step ran these."""
        if self._on:
            self._shares.observe(running)

    def hot(self) -> list[str]:
        """Contents that should be merged, none of which failed a short while ago."""
        now = self._clock()
        self._not_before = {uid: until for uid, until in self._not_before.items() if until > now}
        return [uid for uid in self._shares.above(_HOT) if uid not in self._not_before]

    def has_cooled(self, uid: str) -> bool:
        """Whether a content should be merged no longer."""
        return self._shares.of(uid) < _COLD

    def failed(self, uid: str, *, for_good: bool) -> None:
        """Merging it came to nothing: not again for a while, or at all."""
        self._not_before[uid] = math.inf if for_good else self._clock() + _PAUSE_S
