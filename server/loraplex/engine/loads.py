"""Loads of adapters in progress, from the name that is reserved to the answer.

Owned by the adapter desk. A load goes: name reserved -> files read, lowered and laid out beside the loop -> kept on the
host -> uploaded in slices and tried out (``trials.py``) -> only now visible under its name, and answered. A merge is
the load of its recipe.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass, replace
from typing import Final

from loraplex.adapters.bank import AdapterBank
from loraplex.adapters.facts import AdapterFacts
from loraplex.adapters.merging.recipe import encode, shown
from loraplex.adapters.packed import PackedAdapter
from loraplex.adapters.registry import AdapterRegistry, LoadTicket
from loraplex.adapters.text.spool import TextSpool
from loraplex.engine.answers import Answers
from loraplex.engine.holds import Holds
from loraplex.engine.loader import AdapterLoader, LoadJob, LoadResult
from loraplex.engine.merged_forms import MergedForms
from loraplex.engine.merges import recipe_of
from loraplex.engine.messages import LoadAdapter, MergeAdapters
from loraplex.engine.trials import Trials, Tried
from loraplex.engine.versions import Versions
from loraplex.errors import LoraplexError, OverCapacity
from loraplex.types import AdapterInfo, AdapterState, ResidentMode

log = logging.getLogger("loraplex.adapters")

#: loads that may wait or run at once
_MAX_LOADS: Final = 256


@dataclass(slots=True)
class _Load:
    """Who asked, and, once its files are read, what came of them."""

    frontend: bytes
    op: int
    ticket: LoadTicket
    resident_mode: ResidentMode
    result: LoadResult | None = None

    @property
    def adapter(self) -> PackedAdapter | None:
        return None if self.result is None else self.result.adapter


@dataclass(frozen=True, slots=True)
class LoadParts:
    """What a load passes through, and whom its end concerns."""

    registry: AdapterRegistry
    bank: AdapterBank
    loader: AdapterLoader
    trials: Trials
    texts: TextSpool
    versions: Versions
    forms: MergedForms
    holds: Holds
    answers: Answers


class Loads:
    """Those that have not ended, by the key that the loader knows them by."""

    def __init__(self, parts: LoadParts) -> None:
        self._registry = parts.registry
        self._bank = parts.bank
        self._loader = parts.loader
        self._trials = parts.trials
        self._texts = parts.texts
        self._versions = parts.versions
        self._forms = parts.forms
        self._holds = parts.holds
        self._answers = parts.answers
        self._loads: dict[int, _Load] = {}
        self._keys = itertools.count()

    def __len__(self) -> int:
        return len(self._loads)

    def begin(self, frontend: bytes, message: LoadAdapter) -> None:
        """Begin a load; the Reply comes when the adapter can be served or was refused."""
        try:
            if len(self._loads) >= _MAX_LOADS:
                raise OverCapacity(f"{len(self._loads)} adapters are being loaded already", retry_after_s=1.0)
            ticket = self._registry.begin_load(
                message.name, message.source, pinned=message.pinned, on_conflict=message.on_conflict
            )
        except LoraplexError as error:
            self._answers.refuse(frontend, message.op, error)
            return
        key = next(self._keys)
        self._loads[key] = _Load(frontend, message.op, ticket, message.resident_mode)
        loading = AdapterInfo(message.name, source=message.source, pinned=message.pinned, state=AdapterState.LOADING)
        self._answers.changed(loading)
        self._loader.submit(LoadJob(key, message.name, message.source))

    def begin_merge(self, frontend: bytes, message: MergeAdapters) -> None:
        """Begin a merge: the load of its recipe."""
        try:
            source = encode(recipe_of(message, self._registry))
        except LoraplexError as error:
            self._answers.refuse(frontend, message.op, error)
            return
        self.begin(frontend, LoadAdapter(message.op, message.name, source, message.pinned, message.on_conflict))

    def take(self, result: LoadResult) -> None:
        """The loader has read one, or could not."""
        key, adapter = result.job.key, result.adapter
        load = self._loads[key]
        load.result = result
        if adapter is None:
            assert result.error is not None
            self._fail(key, result.error)
            return
        facts = adapter.facts
        self._versions.claim(facts.uid)
        if facts.chooser is not None:  # a router: nothing of it is for the device
            self._finish(key, facts)
            return
        try:
            self._bank.add(adapter)
            if load.ticket.pinned:
                self._bank.set_pinned(facts.uid, True)
        except LoraplexError as error:
            self._fail(key, error)
            return
        known = self._registry.known(facts.uid)
        if known is None:
            self._trials.begin(facts)
        else:  # the same content serves already under some name
            self._bank.prefetch(facts.uid)
            self._finish(key, replace(facts, probe=known.probe))

    def end_trial(self, tried: Tried) -> None:
        """Answer every load of one content: a uid may be asked for under several names."""
        read = [(key, load.adapter) for key, load in self._loads.items()]
        for key, adapter in read:
            if adapter is None or adapter.uid != tried.uid:
                continue
            if isinstance(tried.outcome, LoraplexError):
                self._fail(key, tried.outcome)
            else:
                self._finish(key, replace(adapter.facts, probe=tried.outcome))

    def _finish(self, key: int, facts: AdapterFacts) -> None:
        load = self._loads.pop(key)
        assert load.result is not None
        assert load.adapter is not None
        self._texts.adopt(load.adapter.text_file, facts.text)
        outcome = self._registry.finish_load(load.ticket, facts)
        self._versions.give_up(facts.uid)
        modes = [load.resident_mode]
        if outcome.replaced is not None:
            modes.append(outcome.replaced.resident_mode)  # it is the name's
            self._forms.drop(outcome.replaced, "it was replaced")
            self._answers.changed(self._registry.info(outcome.replaced))
            if outcome.replaced.state is AdapterState.UNLOADED:
                self._versions.ended(outcome.replaced)
        if ResidentMode.MERGED in modes:
            self._forms.keep_merged(outcome.handle)
        info = self._registry.info(outcome.handle)
        self._answers.changed(info)
        seconds = time.monotonic() - load.result.began_s
        self._answers.reply(load.frontend, load.op, info, load_s=seconds)
        self._holds.retry_parked()
        log.info("adapter %s is ready: uid %s, %d bytes", info.name, info.uid, info.bytes)

    def _fail(self, key: int, error: Exception) -> None:
        load = self._loads.pop(key)
        if not isinstance(error, LoraplexError):
            log.error("loading adapter %s from %s", load.ticket.name, shown(load.ticket.source), exc_info=error)
        failed = self._registry.fail_load(load.ticket, str(error))
        if load.adapter is not None:
            self._texts.discard(load.adapter.text_file)
            self._versions.give_up(load.adapter.uid)
            self._versions.forget_if_unused(load.adapter.uid)
        self._answers.changed(failed)
        self._answers.refuse(load.frontend, load.op, error)
        self._holds.retry_parked()
