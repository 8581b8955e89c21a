"""The engine's adapter desk: load and unload operations, parked requests, and which sequences hold which versions.

Joins the registry (names and versions), the bank (tensors on host and device) and the loader (files). Owned by the
engine core. A load goes: name reserved -> files read, lowered and laid out beside the loop -> kept on the host ->
uploaded in slices and tried out (``trials.py``) -> only now visible under its name, and answered.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Final

from loraplex.adapters.bank import AdapterBank
from loraplex.adapters.facts import AdapterFacts
from loraplex.adapters.packed import PackedAdapter
from loraplex.adapters.registry import AdapterHandle, AdapterRegistry
from loraplex.adapters.text.spool import TextSpool
from loraplex.engine.answers import Answers
from loraplex.engine.loader import AdapterLoader, LoadJob, LoadResult
from loraplex.engine.messages import AdapterGauges, LoadAdapter, PinAdapter, UnloadAdapter
from loraplex.engine.operations import PendingLoad, PendingUnload
from loraplex.engine.sequence import Origin, Sequence
from loraplex.engine.trials import Trials, Tried
from loraplex.engine.uses import Uses, check_names, uses_of
from loraplex.errors import LoraplexError, OverCapacity
from loraplex.types import AdapterInfo, AdapterState, ModelInfo, Request, UnloadMode
from loraplex_kernels.segments import Term

log = logging.getLogger("loraplex.adapters")

#: seconds of uploads between two steps, so that no stream sees a load
_UPLOAD_SLICE_S: Final = 0.004
#: loads that may wait or run at once
_MAX_LOADS: Final = 256


@dataclass(frozen=True, slots=True)
class Turn:
    """What a turn of the desk brought: requests whose adapters came, and sequences that can no longer be served."""

    ready: list[tuple[Origin, Request]] = field(default_factory=list)
    failed: list[tuple[Sequence, LoraplexError]] = field(default_factory=list)


class AdapterDesk:
    """Owns registry and bank on behalf of the core, which takes what there is to say from ``answers``."""

    def __init__(
        self,
        registry: AdapterRegistry,
        bank: AdapterBank,
        loader: AdapterLoader,
        trials: Trials,
        texts: TextSpool,
        model_info: ModelInfo,
    ) -> None:
        self._registry = registry
        self._bank = bank
        self._loader = loader
        self._trials = trials
        self._texts = texts
        self._model_info = model_info
        self.answers = Answers()
        self._keys = itertools.count()
        self._loads: dict[int, PendingLoad] = {}
        self._unloads: list[PendingUnload] = []
        self._held: dict[Origin, tuple[AdapterHandle, ...]] = {}
        self._parked: dict[Origin, Request] = {}
        self._retry_parked = False
        self._failed: list[tuple[Sequence, LoraplexError]] = []
        self._broken: dict[str, LoraplexError] = {}  # uid -> why its upload failed, until it is asked for again
        self._upload_s: list[float] = []

    @property
    def has_work(self) -> bool:
        """Whether a turn would bring something on without a wake-up from outside."""
        return self._bank.uploading or self._trials.has_work or self._retry_parked or bool(self._failed)

    @property
    def has_trial(self) -> bool:
        """Whether ``try_next`` has an adapter to probe."""
        return self._trials.is_due

    @property
    def num_parked(self) -> int:
        """Requests that wait for a first load."""
        return len(self._parked)

    # ---- operations ----

    def load(self, frontend: bytes, message: LoadAdapter) -> None:
        """Begin a load; the Reply comes when the adapter can be served or was refused."""
        try:
            if len(self._loads) >= _MAX_LOADS:
                raise OverCapacity(f"{len(self._loads)} adapters are being loaded already", retry_after_s=1.0)
            ticket = self._registry.begin_load(
                message.name, message.source, pinned=message.pinned, on_conflict=message.on_conflict
            )
        except LoraplexError as error:
            self.answers.refuse(frontend, message.op, error)
            return
        key = next(self._keys)
        self._loads[key] = PendingLoad(frontend, message.op, ticket)
        loading = AdapterInfo(message.name, source=message.source, pinned=message.pinned, state=AdapterState.LOADING)
        self.answers.changed(loading)
        self._loader.submit(LoadJob(key, message.name, message.source))

    def unload(self, frontend: bytes, message: UnloadAdapter) -> list[Origin]:
        """Take a name away; the Reply comes when its last request is over. Returns those to end now (mode ABORT)."""
        try:
            handle = self._registry.unload(message.name)
        except LoraplexError as error:
            self.answers.refuse(frontend, message.op, error)
            return []
        self._unloads.append(PendingUnload(frontend, message.op, handle))
        if handle.state is AdapterState.UNLOADED:
            self._ended(handle)
            return []
        self.answers.changed(self._registry.info(handle))
        if message.mode is not UnloadMode.ABORT:
            return []
        return [origin for origin, handles in self._held.items() if handle in handles]

    def set_pinned(self, frontend: bytes, message: PinAdapter) -> None:
        """Pin or unpin a name, and answer with it; one that is pinned goes onto the device when there is room."""
        try:
            if message.pinned:  # refused, if at all, before the name says that it is
                uid = self._registry.ready(message.name).uid
                self._bank.set_pinned(uid, True)
                self._bank.prefetch(uid)
            handle = self._registry.set_pinned(message.name, message.pinned)
            self._forget_if_unused(handle.uid)
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

    # ---- requests ----

    def acquire(self, origin: Origin, request: Request) -> Uses | None:
        """Hold the versions a request names until ``release``; None: parked until a first load ends.

        Raises NotFound, OverCapacity (they can never be on the device together), or what ``uses_of`` does; nothing is
        held then.
        """
        check_names(request)
        handles = self._registry.acquire_all([ref.name for ref in request.adapters])
        if handles is None:
            self._parked[origin] = request
            return None
        with ExitStack() as undo:
            for handle in handles:
                undo.callback(self._put_back, handle)
            uses = uses_of(request, handles, self._model_info, self._registry.knowing)
            self._bank.check_fits(tuple(handle.uid for handle in handles))
            undo.pop_all()
        self._held[origin] = handles
        return uses

    def release(self, origin: Origin) -> None:
        """A request is over: its versions may go."""
        for handle in self._held.pop(origin, ()):
            self._put_back(handle)

    def unpark(self, origin: Origin) -> bool:
        """Forget a parked request; False when it is not parked."""
        return self._parked.pop(origin, None) is not None

    def drop_frontend(self, frontend: bytes) -> None:
        """A front end is gone. Its loads and unloads go on; nobody is told."""
        for origin in [o for o in self._parked if o.frontend == frontend]:
            del self._parked[origin]

    # ---- the scheduler's view (AdapterSlots), by way of SequenceSlots ----

    def pin(self, sequence: Sequence) -> tuple[Term, ...] | None:
        """Put a sequence's adapters on the device and keep them there; None while that is not possible yet."""
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
        return tuple(Term(slot, on.weight) for slot, on in zip(slots, sequence.uses.active, strict=True))

    def unpin(self, sequence: Sequence) -> None:
        """A sequence no longer runs."""
        self._bank.release(sequence.uids)

    # ---- the turn ----

    def turn(self) -> Turn:
        """Take in finished loads, write a slice of uploads, bring parked requests back."""
        for result in self._loader.take_results():
            self._take_result(result)
        self._broken.clear()
        progress = self._bank.advance(_UPLOAD_SLICE_S)
        for done in progress.done:
            self._upload_s.append(done.seconds)
        for failed in progress.failed:
            log.error("upload failed: %s", failed.error)
            self._broken[failed.uid] = failed.error
        for tried in self._trials.take(progress):
            self._end_trial(tried)
        failed_sequences, self._failed = self._failed, []
        return Turn(self._unpark_all(), failed_sequences)

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
        names = self._names_by_uid()
        return AdapterGauges(
            evictions=stats.evictions,
            device_bytes=stats.device_bytes,
            host_bytes=stats.host_bytes,
            running=_names(running),
            waiting=_names(waiting),
            states={state.value: count for state, count in self._registry.states().items()},
            on_device=tuple(names[uid] for uid in stats.device_uids if uid in names),
            on_host=tuple(names[uid] for uid in stats.host_uids if uid in names),
        )

    # ---- private ----

    def _take_result(self, result: LoadResult) -> None:
        load = self._loads[result.job.key]
        load.result = result
        if result.adapter is None:
            assert result.error is not None
            self._fail_load(result.job.key, result.error)
            return
        try:
            self._bank.add(result.adapter)
            if load.ticket.pinned:
                self._bank.set_pinned(result.adapter.uid, True)
        except LoraplexError as error:
            self._fail_load(result.job.key, error)
            return
        facts = result.adapter.facts
        known = self._registry.known(facts.uid)
        if known is None:
            self._trials.begin(facts)
        else:  # the same content serves already under some name
            self._bank.prefetch(facts.uid)
            self._finish_load(result.job.key, replace(facts, probe=known.probe))

    def _end_trial(self, tried: Tried) -> None:
        """Answer every load of one content: a uid may be asked for under several names."""
        for key, adapter in self._read():
            if adapter.uid != tried.uid:
                continue
            if isinstance(tried.outcome, LoraplexError):
                self._fail_load(key, tried.outcome)
            else:
                self._finish_load(key, replace(adapter.facts, probe=tried.outcome))

    def _finish_load(self, key: int, facts: AdapterFacts) -> None:
        load = self._loads.pop(key)
        assert load.result is not None
        assert load.result.adapter is not None
        self._texts.adopt(load.result.adapter.text_file, facts.text)
        outcome = self._registry.finish_load(load.ticket, facts)
        if outcome.replaced is not None:
            self.answers.changed(self._registry.info(outcome.replaced))
            if outcome.replaced.state is AdapterState.UNLOADED:
                self._ended(outcome.replaced)
        info = self._registry.info(outcome.handle)
        self.answers.changed(info)
        seconds = time.monotonic() - load.result.began_s
        self.answers.reply(load.frontend, load.op, info, load_s=seconds)
        self._retry_parked = True
        log.info("adapter %s is ready: uid %s, %d bytes", info.name, info.uid, info.bytes)

    def _fail_load(self, key: int, error: Exception) -> None:
        load = self._loads.pop(key)
        if not isinstance(error, LoraplexError):
            log.error("loading adapter %s from %s", load.ticket.name, load.ticket.source, exc_info=error)
        failed = self._registry.fail_load(load.ticket, str(error))
        if load.result is not None and load.result.adapter is not None:
            self._texts.discard(load.result.adapter.text_file)
            self._forget_if_unused(load.result.adapter.uid)
        self.answers.changed(failed)
        self.answers.refuse(load.frontend, load.op, error)
        self._retry_parked = True

    def _unpark_all(self) -> list[tuple[Origin, Request]]:
        if not self._retry_parked:
            return []
        self._retry_parked = False
        ready, self._parked = list(self._parked.items()), {}
        return ready

    def _put_back(self, handle: AdapterHandle) -> None:
        if self._registry.release(handle):
            self._ended(handle)

    def _ended(self, handle: AdapterHandle) -> None:
        """A version is UNLOADED: forget its tensors if no other name has the same content, and answer who waits."""
        info = self._registry.info(handle)
        self._forget_if_unused(handle.uid)
        self._texts.drop(handle.facts.text)
        self.answers.changed(info)
        for unload in [u for u in self._unloads if u.handle is handle]:
            self._unloads.remove(unload)
            self.answers.reply(unload.frontend, unload.op, info)

    def _forget_if_unused(self, uid: str) -> None:
        loading = any(adapter.uid == uid for _, adapter in self._read())
        if not loading and not self._registry.holds(uid) and self._bank.holds(uid):
            self._bank.remove(uid)
        elif self._bank.holds(uid) and not loading:
            self._bank.set_pinned(uid, self._registry.pins(uid))

    def _read(self) -> list[tuple[int, PackedAdapter]]:
        """Loads in progress whose files have been read, by key."""
        results = [(key, load.result) for key, load in self._loads.items()]
        return [(key, result.adapter) for key, result in results if result is not None and result.adapter is not None]

    def _names_by_uid(self) -> dict[str, str]:
        return {info.uid: info.name for info in self._registry.list() if info.uid}


class SequenceSlots:
    """The desk as the scheduler sees it."""

    def __init__(self, desk: AdapterDesk) -> None:
        self._desk = desk

    def acquire(self, sequence: Sequence) -> tuple[Term, ...] | None:
        return self._desk.pin(sequence)

    def release(self, sequence: Sequence) -> None:
        self._desk.unpin(sequence)


def _names(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(Counter(a.name for s in sequences for a in s.adapters))
