"""The adapters of sequences on the device: ``AdapterSlots`` of a bank, as the scheduler sees it.

Owned by the adapter desk, which tells it what could not be brought there.
"""

from __future__ import annotations

from collections.abc import Iterable

from loraplex.adapters.bank import AdapterBank
from loraplex.adapters.progress import UploadFailed
from loraplex.engine.sequence import Sequence
from loraplex.errors import LoraplexError, OverCapacity
from loraplex.types import Residency
from loraplex_kernels.segments import Term


class SequenceSlots:
    """Pins what sequences run with, and keeps those that cannot run any more until ``take_failed``."""

    def __init__(self, bank: AdapterBank) -> None:
        self._bank = bank
        self._failed: list[tuple[Sequence, LoraplexError]] = []
        self._broken: dict[str, LoraplexError] = {}  # uid -> why its upload failed

    @property
    def has_failed(self) -> bool:
        """Whether ``take_failed`` has some."""
        return bool(self._failed)

    def acquire(self, sequence: Sequence) -> tuple[Term, ...] | None:
        """Put a sequence's adapters on the device and keep them there; None while that is not possible yet. A merged
        form that has been put out for others is not waited for: the adapter itself is as good."""
        if sequence.uses.merged and not self._has_merged(sequence):
            sequence.give_up_merged()
        uids = sequence.uids
        if not uids:
            return ()
        for uid in uids:
            if uid in self._broken:
                self._failed.append((sequence, self._broken[uid]))
                return None
        try:
            slots = self._bank.ensure(uids)
        except OverCapacity as error:  # an adapter was pinned since the request was accepted
            self._failed.append((sequence, error))
            return None
        if slots is None:
            return None
        self._bank.retain(uids)
        weights = (*(on.weight for on in sequence.uses.active), 1.0)  # the last one is a merged form's
        return tuple(Term(slot, weight) for slot, weight in zip(slots, weights, strict=False))

    def release(self, sequence: Sequence) -> None:
        """A sequence no longer runs."""
        self._bank.release(sequence.uids)

    def uploads_failed(self, failures: Iterable[UploadFailed]) -> None:
        """What the last slice of uploads could not bring: who asks for it until the next one fails with it."""
        self._broken = {failure.uid: failure.error for failure in failures}

    def take_failed(self) -> list[tuple[Sequence, LoraplexError]]:
        """Sequences that can no longer be served, since the last call."""
        failed, self._failed = self._failed, []
        return failed

    def _has_merged(self, sequence: Sequence) -> bool:
        """Whether its merged form is on the device, where there is room for the adapter beside it."""
        try:
            self._bank.check_fits(sequence.uids)
        except OverCapacity:
            return False
        return self._bank.residency(sequence.uses.merged) is Residency.DEVICE
