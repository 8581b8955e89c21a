"""Adapters that are loaded and not yet served: each is brought to the device and probed before anybody may name it.

Owned by the adapter desk. Uploads go beside running work; where there is no room for one beside it, it is squeezed in,
one at a time, for as long as its probe takes. One is probed at a time, a slice of it between two steps, so that running
streams hardly see it, however many are being loaded.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from loraplex.adapters.bank import AdapterBank
from loraplex.adapters.facts import AdapterFacts
from loraplex.adapters.progress import Progress
from loraplex.engine.probe import Pieces
from loraplex.errors import InternalError, LoraplexError
from loraplex.types import Probe, Residency

log = logging.getLogger("loraplex.adapters")

#: seconds of a probe between two steps: a whole one takes as long as a step and more
PROBE_SLICE_S: Final = 0.004


@dataclass(frozen=True, slots=True)
class Tried:
    """The end of a trial: a probe, or why the adapter is not served."""

    uid: str
    outcome: Probe | LoraplexError


@dataclass(frozen=True, slots=True)
class _Due:
    """What is on the device and kept there until it has been probed: ``uids``, the first of which is tried."""

    uids: tuple[str, ...]
    start: Callable[[tuple[int, ...]], Pieces[Probe]]

    @property
    def uid(self) -> str:
        return self.uids[0]


class Trials:
    """Contents on their way to being served, by uid."""

    def __init__(
        self,
        bank: AdapterBank,
        probe: Callable[[int, AdapterFacts], Pieces[Probe]],
        *,
        slice_s: float = PROBE_SLICE_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``probe`` tries what is in a slot, and may raise anything; ``slice_s``: of it, between two steps."""
        self._bank = bank
        self._probe = probe
        self._slice_s = slice_s
        self._clock = clock
        self._running: Pieces[Probe] | None = None  # of the first that is due
        self._coming: dict[str, AdapterFacts] = {}  # not on the device yet, in order
        self._due: deque[_Due] = deque()
        self._squeezed: str | None = None

    @property
    def has_work(self) -> bool:
        """Whether anything is to be done before all is tried."""
        return bool(self._coming or self._due)

    @property
    def is_due(self) -> bool:
        """Whether ``run`` has one to probe."""
        return bool(self._due)

    def begin(self, facts: AdapterFacts) -> None:
        """Try a content that the bank keeps; nothing happens when its trial has begun already."""
        uid = facts.uid
        if uid not in self._coming and all(uid != other.uid for other in self._due):
            self._coming[uid] = facts
            self._bank.prefetch(uid)

    def take(self, progress: Progress) -> list[Tried]:
        """Go on with what has come to the device, or could not. Returns the trials that this has ended."""
        ended = [Tried(failed.uid, failed.error) for failed in progress.failed if self._coming.pop(failed.uid, None)]
        for tried in ended:
            self._leave(tried.uid)
        for uid in [uid for uid in self._coming if self._bank.residency(uid) is Residency.DEVICE]:
            self._bank.retain([uid])  # nothing that is admitted before its turn may push it out
            self._due.append(_Due((uid,), partial(self._probe_one, self._coming.pop(uid))))
        if self._squeezed is None:
            self._squeezed = next((uid for uid in self._coming if not self._bank.is_uploading(uid)), None)
            if self._squeezed is not None:
                self._bank.squeeze_in(self._squeezed)
        return ended

    def put(self, uids: tuple[str, ...], start: Callable[[tuple[int, ...]], Pieces[Probe]]) -> None:
        """Try the first of these contents, which are on the device, in its turn: ``start`` is given the slots of all,
        where they stay until then."""
        self._bank.retain(uids)
        self._due.append(_Due(uids, start))

    def run(self) -> Tried | None:
        """Go on probing what ``is_due``, for a slice of time; the end of its trial, where this has come to it.

        No step may be in flight.
        """
        due = self._due[0]
        uid, started = due.uid, self._clock()
        try:
            if self._running is None:
                self._running = due.start(self._bank.slots(due.uids))
            next(self._running)
            while self._clock() - started < self._slice_s:
                next(self._running)
            return None
        except StopIteration as end:
            outcome: Probe | LoraplexError = end.value
        except LoraplexError as error:
            outcome = error
        except Exception as error:  # whatever its tensors can cause belongs to its own load
            log.exception("probing adapter %s failed", uid)
            outcome = InternalError(f"adapter {uid}: its probe failed: {type(error).__name__}: {error}")
        self._running = None
        self._due.popleft()
        self._bank.release(due.uids)
        self._leave(uid)
        return Tried(uid, outcome)

    def _probe_one(self, facts: AdapterFacts, slots: tuple[int, ...]) -> Pieces[Probe]:
        (slot,) = slots
        return self._probe(slot, facts)

    def _leave(self, uid: str) -> None:
        """A trial is over: what was squeezed in gives its room back."""
        if self._squeezed == uid:
            self._squeezed = None
            self._bank.keep_to_budget(uid)
