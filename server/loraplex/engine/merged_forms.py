"""Merged forms: adapters folded into the base, kept beside themselves, and which requests are given them.

Owned by the adapter desk. A form goes: the adapter's source read again and folded beside the loop -> kept on the host
under a uid of its own -> brought to the device beside the adapter itself -> held against it over a short prompt ->
given to new requests that use the adapter alone, with weight 1, for the steps that they have to themselves. In steps
beside others, and of all other requests, the adapter itself is used. Taken off, it is given to nobody at once, and its
memory is free when its last request is over; the base's weights are never touched.

One that is asked for is pinned. One that ``AutoMerge`` wants has what memory is left, and goes when others need that.
"""

from __future__ import annotations

import enum
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Protocol

from loraplex.adapters.bank import AdapterBank
from loraplex.adapters.facts import AdapterFacts
from loraplex.adapters.folding import begins_later, folded_uid, no_room
from loraplex.adapters.packed import PackedAdapter
from loraplex.adapters.progress import Progress
from loraplex.adapters.registry import AdapterHandle, AdapterRegistry
from loraplex.engine.answers import Answers
from loraplex.engine.auto_merge import AutoMerge
from loraplex.engine.loader import AdapterLoader, FoldOrder, LoadJob, LoadResult
from loraplex.engine.messages import SetResidentMode
from loraplex.engine.probe import Pieces
from loraplex.engine.routing import check_has_weights
from loraplex.engine.sequence import Origin
from loraplex.engine.sequence import Sequence as Generated
from loraplex.engine.trials import Trials, Tried
from loraplex.engine.uses import Uses
from loraplex.errors import LoraplexError, Mismatch, UnsupportedFeature
from loraplex.types import Probe, Residency, ResidentMode

log = logging.getLogger("loraplex.adapters")

Asker = tuple[bytes, int]
"""The front end that asked, and its operation."""


class Agreement(Protocol):
    """``Prober.agreement``."""

    def __call__(self, facts: AdapterFacts, slots: tuple[int, ...]) -> Pieces[Probe]: ...


@dataclass(frozen=True, slots=True)
class FormParts:
    """What forms are made, kept and tried with. ``put_back``: gives a reference to a version back."""

    registry: AdapterRegistry
    bank: AdapterBank
    loader: AdapterLoader
    trials: Trials
    answers: Answers
    put_back: Callable[[AdapterHandle], None]
    merging: Merging


@dataclass(frozen=True, slots=True)
class Merging:
    """``agreement``: how a form is held against its adapter; ``auto``: what its traffic is worth; ``caution``: what to
    say where a form may be slower than the adapter itself."""

    agreement: Agreement
    auto: AutoMerge
    caution: str = ""


class _Stage(enum.Enum):
    MAKING = "making"
    COMING = "on its way to the device"
    TRYING = "being held against the adapter itself"
    ON = "given to requests"
    ENDED = "of no use"


@dataclass(eq=False, slots=True)
class _Form:
    """The merged form of one content. ``handles``: versions whose requests are to be given it; ``tried``: the one that
    is kept there for its trial."""

    uid: str
    handles: list[AdapterHandle] = field(default_factory=list)
    askers: list[tuple[Asker, AdapterHandle]] = field(default_factory=list)
    stage: _Stage = _Stage.MAKING
    facts: AdapterFacts | None = None
    tried: AdapterHandle | None = None
    users: int = 0

    @property
    def own_uid(self) -> str:
        return folded_uid(self.uid)

    @property
    def is_asked_for(self) -> bool:
        """By somebody, and not only by its traffic."""
        return bool(self.askers) or any(handle.resident_mode is ResidentMode.MERGED for handle in self.handles)


#: keys of jobs, apart from those of loads
_FIRST_KEY: Final = -1


class MergedForms:
    """All merged forms, by the uid of their adapter."""

    def __init__(self, parts: FormParts) -> None:
        self._parts = parts
        self._registry = parts.registry
        self._bank = parts.bank
        self._auto = parts.merging.auto
        self._forms: dict[str, _Form] = {}
        self._jobs: dict[int, _Form] = {}
        self._keys = itertools.count(_FIRST_KEY, -1)
        self._users: dict[Origin, _Form] = {}

    @property
    def has_work(self) -> bool:
        """Whether a turn would bring something on without a wake-up from outside."""
        return any(form.stage is _Stage.COMING for form in self._forms.values())

    # ---- what is asked for ----

    def set_mode(self, frontend: bytes, message: SetResidentMode) -> None:
        """Keep a name merged, or no longer; the Reply comes when it is."""
        answers = self._parts.answers
        try:
            handle = self._registry.ready(message.name)
        except LoraplexError as error:
            answers.refuse(frontend, message.op, error)
            return
        if message.mode is ResidentMode.MERGED:
            self.keep_merged(handle, (frontend, message.op))
            return
        self.drop(handle, "its resident mode was set to auto")
        answers.reply(frontend, message.op, self._registry.info(handle))

    def keep_merged(self, handle: AdapterHandle, asker: Asker | None = None) -> None:
        """Make the merged form of a READY version, and give it to its requests. Without an ``asker`` a failure is
        logged."""
        form = self._forms.get(handle.uid)
        try:
            check_has_weights(handle, "merge", "resident_mode")
            if handle.facts.invocation_tokens:
                raise begins_later(f"{handle.name!r}")
            if form is not None and form.stage is not _Stage.MAKING:
                self._bank.set_pinned(form.own_uid, True)
                # it was put out while nobody had asked for it, or is there for those who were given it alone
                if form.stage is _Stage.ENDED or (form.stage is _Stage.ON and not self._is_there(form)):
                    form.stage = _Stage.COMING
        except LoraplexError as error:
            self._refuse(handle.name, [asker] if asker else [], error)
            return
        if form is None:
            form = self._begin(handle, self._bank.room(evicting=True))
        if handle not in form.handles:
            form.handles.append(handle)
        if asker is None:
            self._registry.set_resident(handle, ResidentMode.MERGED, handle.merged_bytes)
        else:
            form.askers.append((asker, handle))
        if form.stage is _Stage.ON:
            self._give(form)

    def drop(self, handle: AdapterHandle, why: str) -> None:
        """New requests of a version are given the adapter itself from now on."""
        form = self._forms.get(handle.uid)
        shown = handle.resident_mode, handle.merged_bytes
        self._registry.set_resident(handle, ResidentMode.AUTO, 0)
        if form is not None and handle in form.handles:
            form.handles.remove(handle)
            left = [asked for asked in form.askers if asked[1] is handle]
            form.askers = [asked for asked in form.askers if asked[1] is not handle]
            for asker, _ in left:
                self._parts.answers.refuse(*asker, Mismatch(f"adapter {handle.name!r}: {why} while it was merged"))
            if not form.is_asked_for and self._bank.holds(form.own_uid):
                self._bank.set_pinned(form.own_uid, False)
            if not form.handles and form.stage is _Stage.COMING:
                form.stage = _Stage.ENDED
            self._settle(form)
        if shown != (ResidentMode.AUTO, 0):
            self._parts.answers.changed(self._registry.info(handle))

    # ---- requests ----

    def give(self, origin: Origin, uses: Uses, handles: Sequence[AdapterHandle]) -> Uses:
        """What a request uses that holds ``handles``, with the merged form of its adapter where there is one; that is
        kept for it until ``release``."""
        form = self._forms.get(uses.alone) if uses.alone else None
        if form is None or form.stage is not _Stage.ON or not any(handle in form.handles for handle in handles):
            return uses
        if not self._is_there(form):
            return uses  # put out for others: nobody waits for it
        form.users += 1
        self._users[origin] = form
        return replace(uses, merged=form.own_uid)

    def release(self, origin: Origin) -> None:
        """A request is over."""
        form = self._users.pop(origin, None)
        if form is not None:
            form.users -= 1
            self._settle(form)

    def observe(self, running: Iterable[Generated]) -> None:
        """A step ran these."""
        self._auto.observe(running)

    def names(self) -> tuple[str, ...]:
        """Adapters whose requests are given a merged form."""
        return tuple(handle.name for form in self._forms.values() for handle in form.handles if handle.merged_bytes)

    # ---- the turn ----

    def take(self, result: LoadResult) -> bool:
        """Take in what the loader made; False: it was no merged form."""
        form = self._jobs.pop(result.job.key, None)
        if form is None:
            return False
        if not form.handles:  # nobody wants it any more
            if result.adapter is not None:
                result.adapter.discard()
            del self._forms[form.uid]
        elif result.adapter is None:
            assert result.error is not None
            self._fail(form, result.error)
        else:
            self._keep(form, result.adapter)
        return True

    def advance(self, progress: Progress) -> None:
        """Bring forms to the device, and see to those that nobody asked for."""
        failed = {failure.uid: failure.error for failure in progress.failed}
        for form in [form for form in self._forms.values() if form.stage is _Stage.COMING]:
            if form.own_uid in failed:
                self._fail(form, failed[form.own_uid])
            else:
                self._bring(form)
        if self._auto.is_due:
            self._follow_traffic()

    def end_trial(self, tried: Tried) -> bool:
        """Take in the end of a trial; False: it was of no merged form."""
        form = next((form for form in self._forms.values() if form.own_uid == tried.uid), None)
        if form is None:
            return False
        handle, form.tried = form.tried, None
        assert handle is not None
        self._parts.put_back(handle)
        if isinstance(tried.outcome, LoraplexError):
            self._fail(form, tried.outcome)
        else:
            form.stage = _Stage.ON
            self._give(form)
            self._settle(form)
        return True

    # ---- private ----

    def _begin(self, handle: AdapterHandle, room_bytes: int) -> _Form:
        form, key = _Form(handle.uid, [handle]), next(self._keys)
        self._forms[handle.uid] = self._jobs[key] = form
        self._parts.loader.submit(LoadJob(key, handle.name, handle.source, FoldOrder(handle.uid, room_bytes)))
        return form

    def _keep(self, form: _Form, made: PackedAdapter) -> None:
        """Keep what the loader made; on the device, too, once it is there and was asked for."""
        room, nbytes = self._bank.room(evicting=form.is_asked_for), made.footprint.nbytes
        if nbytes > room:  # less than when it began, or more than it seemed
            made.discard()
            self._fail(form, no_room(form.handles[0].name, nbytes, room))
            return
        form.facts, form.stage = made.facts, _Stage.COMING
        self._bank.add(made)
        self._bank.set_pinned(form.own_uid, form.is_asked_for)

    def _bring(self, form: _Form) -> None:
        assert form.facts is not None
        uids = form.own_uid, form.uid
        try:
            if self._bank.ensure(uids) is None:
                return
        except LoraplexError as error:
            self._fail(form, error)
            return
        form.tried, form.stage = self._registry.acquire(form.handles[0].name), _Stage.TRYING
        self._parts.trials.put(uids, partial(self._parts.merging.agreement, form.facts))

    def _is_there(self, form: _Form) -> bool:
        return self._bank.residency(form.own_uid) is Residency.DEVICE

    def _give(self, form: _Form) -> None:
        assert form.facts is not None
        asked = {id(handle) for _, handle in form.askers}
        for handle in form.handles:
            mode = ResidentMode.MERGED if id(handle) in asked else handle.resident_mode
            if (mode, form.facts.nbytes) != (handle.resident_mode, handle.merged_bytes):
                self._registry.set_resident(handle, mode, form.facts.nbytes)
                self._parts.answers.changed(self._registry.info(handle))
                caution = self._parts.merging.caution
                log.info("adapter %s is served merged: %d bytes%s", handle.name, form.facts.nbytes, caution)
        for asker, handle in form.askers:
            self._parts.answers.reply(*asker, self._registry.info(handle))
        form.askers = []

    def _fail(self, form: _Form, error: Exception) -> None:
        """Nobody is given the form. Requests that run on it go on."""
        askers, form.askers = [asker for asker, _ in form.askers], []
        self._refuse(", ".join(handle.name for handle in form.handles), askers, error)
        self._auto.failed(form.uid, for_good=isinstance(error, UnsupportedFeature))
        form.stage = _Stage.ENDED
        for handle in list(form.handles):
            self.drop(handle, str(error))
        self._settle(form)

    def _refuse(self, names: str, askers: Sequence[Asker], error: Exception) -> None:
        if isinstance(error, LoraplexError):
            log.warning("adapter %s is not served merged: %s", names, error)
        else:
            log.error("merging adapter %s failed", names, exc_info=error)
        for asker in askers:
            self._parts.answers.refuse(*asker, error)

    def _settle(self, form: _Form) -> None:
        """Forget a form that nobody is given and nobody runs on."""
        busy = form.stage in (_Stage.MAKING, _Stage.TRYING)
        if form.handles or form.users or busy or self._forms.get(form.uid) is not form:
            return
        del self._forms[form.uid]
        if self._bank.holds(form.own_uid):
            self._bank.remove(form.own_uid)

    def _follow_traffic(self) -> None:
        """Begin what its traffic is worth; end what it is not any more, or what has been put out for others."""
        for form in list(self._forms.values()):
            is_out = form.stage is _Stage.ON and not self._is_there(form)
            if not form.is_asked_for and (is_out or self._auto.has_cooled(form.uid)):
                for handle in list(form.handles):
                    self.drop(handle, "its traffic is elsewhere")
        for uid in self._auto.hot():
            handles = self._registry.of(uid)
            if uid not in self._forms and handles:
                self._begin(handles[0], self._bank.room(evicting=False)).handles[:] = handles
