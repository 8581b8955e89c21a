"""Adapters that are loaded and not yet served: each is brought to the device and probed before anybody may name it.

Owned by the adapter desk. Uploads go beside running work; where there is no room for one beside it, it is squeezed in,
one at a time, for as long as its probe takes. One adapter is probed a turn, so that running streams see one small step
between two of theirs, however many are being loaded.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from loraplex.adapters.bank import AdapterBank
from loraplex.adapters.facts import AdapterFacts
from loraplex.adapters.progress import Progress
from loraplex.errors import InternalError, LoraplexError
from loraplex.types import Probe, Residency

log = logging.getLogger("loraplex.adapters")


@dataclass(frozen=True, slots=True)
class Tried:
    """The end of a trial: a probe, or why the adapter is not served."""

    uid: str
    outcome: Probe | LoraplexError


class Trials:
    """Contents on their way to being served, by uid."""

    def __init__(self, bank: AdapterBank, probe: Callable[[int, AdapterFacts], Probe]) -> None:
        """``probe`` tries what is in a slot, and may raise anything."""
        self._bank = bank
        self._probe = probe
        self._coming: dict[str, AdapterFacts] = {}  # not on the device yet, in order
        self._due: deque[AdapterFacts] = deque()  # there, and kept there
        self._squeezed: str | None = None

    @property
    def has_work(self) -> bool:
        """Whether anything is to be done before all is tried."""
        return bool(self._coming or self._due)

    @property
    def is_due(self) -> bool:
        """Whether ``run_next`` has one to probe."""
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
            self._due.append(self._coming.pop(uid))
        if self._squeezed is None:
            self._squeezed = next((uid for uid in self._coming if not self._bank.is_uploading(uid)), None)
            if self._squeezed is not None:
                self._bank.squeeze_in(self._squeezed)
        return ended

    def run_next(self) -> Tried:
        """Probe one that ``is_due``. No step may be in flight."""
        facts = self._due.popleft()
        (slot,) = self._bank.slots([facts.uid])
        try:
            outcome: Probe | LoraplexError = self._probe(slot, facts)
        except LoraplexError as error:
            outcome = error
        except Exception as error:  # whatever its tensors can cause belongs to its own load
            log.exception("probing adapter %s failed", facts.uid)
            outcome = InternalError(f"adapter {facts.uid}: its probe failed: {type(error).__name__}: {error}")
        self._bank.release([facts.uid])
        self._leave(facts.uid)
        return Tried(facts.uid, outcome)

    def _leave(self, uid: str) -> None:
        """A trial is over: what was squeezed in gives its room back."""
        if self._squeezed == uid:
            self._squeezed = None
            self._bank.keep_to_budget(uid)
