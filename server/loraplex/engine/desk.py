"""The engine's adapter desk: what front ends ask about adapters, and the adapters' part of every turn.

Joins the registry (names and versions), the bank (tensors on host and device) and the loader (files), and puts those
together that know one thing each: loads (in progress), versions (who needs one), holds (of requests), forms (merged
ones), slots (the scheduler's view), answers (what there is to say). Owned by the engine core.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from loraplex.adapters.bank import AdapterBank
from loraplex.adapters.registry import AdapterHandle, AdapterRegistry
from loraplex.adapters.text.spool import TextSpool
from loraplex.engine.answers import Answers
from loraplex.engine.holds import Holds
from loraplex.engine.loader import AdapterLoader
from loraplex.engine.loads import LoadParts, Loads
from loraplex.engine.merged_forms import FormParts, MergedForms, Merging
from loraplex.engine.messages import AdapterGauges, PinAdapter, UnloadAdapter
from loraplex.engine.sequence import Origin, Sequence
from loraplex.engine.sequence_slots import SequenceSlots
from loraplex.engine.trials import Trials, Tried
from loraplex.engine.versions import Versions
from loraplex.errors import LoraplexError
from loraplex.types import AdapterState, ModelInfo, Request, UnloadMode

log = logging.getLogger("loraplex.adapters")

#: seconds of uploads between two steps, so that no stream sees a load
_UPLOAD_SLICE_S: Final = 0.004


@dataclass(frozen=True, slots=True)
class Turn:
    """What a turn of the desk brought: requests whose adapters came, and sequences that can no longer be served."""

    ready: list[tuple[Origin, Request]] = field(default_factory=list)
    failed: list[tuple[Sequence, LoraplexError]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class DeskParts:
    """What a desk is made of."""

    registry: AdapterRegistry
    bank: AdapterBank
    loader: AdapterLoader
    trials: Trials
    texts: TextSpool
    merging: Merging


class AdapterDesk:
    """Owns registry and bank on behalf of the core, which takes what there is to say from ``answers``."""

    def __init__(self, parts: DeskParts, model_info: ModelInfo) -> None:
        self._registry, self._bank, self._loader = registry, bank, loader = parts.registry, parts.bank, parts.loader
        self._trials = trials = parts.trials
        self._upload_s: list[float] = []
        self.answers = answers = Answers()
        self.slots = SequenceSlots(bank)
        self.versions = versions = Versions(registry, bank, parts.texts, answers)
        self.forms = forms = MergedForms(
            FormParts(registry, bank, loader, trials, answers, versions.put_back, parts.merging)
        )
        self.holds = holds = Holds(registry, bank, versions, forms, model_info)
        self.loads = Loads(LoadParts(registry, bank, loader, trials, parts.texts, versions, forms, holds, answers))

    @property
    def has_work(self) -> bool:
        """Whether a turn would bring something on without a wake-up from outside."""
        parts = self._trials, self.forms, self.holds
        return self._bank.uploading or self.slots.has_failed or any(part.has_work for part in parts)

    @property
    def has_trial(self) -> bool:
        """Whether ``try_next`` has an adapter to probe."""
        return self._trials.is_due

    # ---- what front ends ask for, beside loads ----

    def unload(self, frontend: bytes, message: UnloadAdapter) -> AdapterHandle | None:
        """Take a name away; the Reply comes when its version's last user is over. Returns the version whose users are
        to end now (mode ABORT)."""
        try:
            handle = self._registry.unload(message.name)
        except LoraplexError as error:
            self.answers.refuse(frontend, message.op, error)
            return None
        self.forms.drop(handle, "it was unloaded")
        self.versions.answer_at_end(frontend, message.op, handle)
        if handle.state is AdapterState.UNLOADED:
            self.versions.ended(handle)
            return None
        self.answers.changed(self._registry.info(handle))
        return handle if message.mode is UnloadMode.ABORT else None

    def set_pinned(self, frontend: bytes, message: PinAdapter) -> None:
        """Pin or unpin a name, and answer with it; one that is pinned goes onto the device when there is room."""
        try:
            if message.pinned:  # refused, if at all, before the name says that it is
                uid = self._registry.ready(message.name).uid
                if self._bank.holds(uid):  # not a router
                    self._bank.set_pinned(uid, True)
                    self._bank.prefetch(uid)
            handle = self._registry.set_pinned(message.name, message.pinned)
            self.versions.forget_if_unused(handle.uid)
        except LoraplexError as error:
            self.answers.refuse(frontend, message.op, error)
            return
        info = self._registry.info(handle)
        self.answers.changed(info)
        self.answers.reply(frontend, message.op, info)

    def answer_all(self, frontend: bytes, op: int) -> None:
        """Answer with all adapters."""
        self.answers.reply(frontend, op, *self._registry.list())

    def answer_one(self, frontend: bytes, op: int, name: str) -> None:
        """Answer with one adapter."""
        try:
            self.answers.reply(frontend, op, self._registry.get(name))
        except LoraplexError as error:
            self.answers.refuse(frontend, op, error)

    # ---- the turn ----

    def turn(self) -> Turn:
        """Take in finished loads, write a slice of uploads, bring parked requests back."""
        for result in self._loader.take_results():
            if not self.forms.take(result):
                self.loads.take(result)
        progress = self._bank.advance(_UPLOAD_SLICE_S)
        for done in progress.done:
            self._upload_s.append(done.seconds)
        for failed in progress.failed:
            log.error("upload failed: %s", failed.error)
        self.slots.uploads_failed(progress.failed)
        for tried in self._trials.take(progress):
            self._end_trial(tried)
        self.forms.advance(progress)
        return Turn(self.holds.take_parked(), self.slots.take_failed())

    def try_next(self) -> None:
        """Go on probing an adapter that has come to the device. No step may be in flight."""
        if (tried := self._trials.run()) is not None:
            self._end_trial(tried)

    def take_uploads(self) -> tuple[float, ...]:
        """Seconds of each upload that ended since the last call."""
        seconds, self._upload_s = tuple(self._upload_s), []
        return seconds

    def gauges(self, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> AdapterGauges:
        """The adapters as they stand."""
        stats = self._bank.stats()
        names: defaultdict[str, list[str]] = defaultdict(list)  # of one content there may be several
        for info in self._registry.list():
            names[info.uid].append(info.name)
        return AdapterGauges(
            evictions=stats.evictions,
            device_bytes=stats.device_bytes,
            host_bytes=stats.host_bytes,
            running=_names(running),
            waiting=_names(waiting),
            states={state.value: count for state, count in self._registry.states().items()},
            on_device=tuple(name for uid in stats.device_uids for name in names.get(uid, ())),
            on_host=tuple(name for uid in stats.host_uids for name in names.get(uid, ())),
            merged=self.forms.names(),
        )

    def _end_trial(self, tried: Tried) -> None:
        if not self.forms.end_trial(tried):
            self.loads.end_trial(tried)


def _names(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(Counter(a.name for s in sequences for a in s.adapters))
