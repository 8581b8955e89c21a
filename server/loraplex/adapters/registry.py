"""Which adapter a name means: versions under names, their references, and their way in and out.

Owned by the engine loop, so there are no locks; knows no tensors (``bank.py`` has those, by uid). A name has at most
one READY version and at most one load in progress; versions that were replaced or unloaded stay until their last
request is over. Two-phase unload: ``unload`` takes the name away, the ``release`` that answers True ends the version.
"""

from __future__ import annotations

import difflib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Final

from loraplex.adapters.facts import AdapterFacts
from loraplex.adapters.merging.recipe import shown
from loraplex.errors import AlreadyExists, InvalidRequest, Mismatch, NotFound
from loraplex.types import NAME_PATTERN, ROUTER_PREFIX, AdapterInfo, AdapterState, OnConflict, Residency, ResidentMode

_NAME: Final = re.compile(NAME_PATTERN)
#: names compared to find the nearest: a refusal stays cheap however many adapters are loaded
_MAX_COMPARED: Final = 256
#: names that a refusal lists where none is near
_MAX_SHOWN: Final = 8


@dataclass(frozen=True, slots=True)
class LoadTicket:
    """A load in progress."""

    name: str
    source: str
    pinned: bool
    on_conflict: OnConflict


@dataclass(eq=False, slots=True)
class AdapterHandle:
    """One version of a named adapter. Mutable, and changed by the registry alone; requests hold on to it."""

    name: str
    generation: int
    source: str
    facts: AdapterFacts
    pinned: bool
    state: AdapterState
    loaded_at: float
    last_used_at: float = 0.0
    refs: int = 0
    resident_mode: ResidentMode = ResidentMode.AUTO
    #: of its merged form, where requests are given that
    merged_bytes: int = 0

    @property
    def uid(self) -> str:
        return self.facts.uid


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """A finished load: the version now READY and the one it replaced (DRAINING, or UNLOADED when unused)."""

    handle: AdapterHandle
    replaced: AdapterHandle | None


class AdapterRegistry:
    """Names, versions and references. Owner: the engine loop."""

    def __init__(self, residency: Callable[[str], Residency], clock: Callable[[], float] = time.time) -> None:
        """``residency`` says where a uid's tensors are; ``clock`` gives Unix seconds."""
        self._residency = residency
        self._clock = clock
        self._ready: dict[str, AdapterHandle] = {}
        self._loading: dict[str, LoadTicket] = {}
        self._draining: dict[str, list[AdapterHandle]] = {}
        self._generations: Counter[str] = Counter()
        self._uids: Counter[str] = Counter()

    # ---- loads ----

    def begin_load(
        self, name: str, source: str, *, pinned: bool = False, on_conflict: OnConflict = OnConflict.FAIL
    ) -> LoadTicket:
        """Reserve ``name`` for a load. With REPLACE the present version serves until the load is finished.

        Raises:
            InvalidRequest: the name is not plain, or begins as those that stand for a router's choice.
            AlreadyExists: it is being loaded, or is loaded and ``on_conflict`` is FAIL.
        """
        if not _NAME.fullmatch(name):
            raise InvalidRequest(f"adapter name {name[:128]!r} does not match {NAME_PATTERN}", field="name")
        if name.startswith(ROUTER_PREFIX):
            raise InvalidRequest(
                f"adapter name {name!r} begins with {ROUTER_PREFIX!r}, which asks for the choice of a router; load the "
                "router under its plain name",
                field="name",
            )
        if name in self._loading:
            raise AlreadyExists(
                f"adapter {name!r} is being loaded from {shown(self._loading[name].source)}", field="name"
            )
        if name in self._ready and on_conflict is OnConflict.FAIL:
            raise AlreadyExists(
                f"adapter {name!r} is loaded (uid {self._ready[name].uid}); use another name, or replace it "
                f"(on_conflict=REPLACE, or --replace)",
                field="name",
            )
        ticket = LoadTicket(name, source, pinned, on_conflict)
        self._loading[name] = ticket
        return ticket

    def finish_load(self, ticket: LoadTicket, facts: AdapterFacts) -> LoadOutcome:
        """Make the loaded version the one its name means, at once and whole."""
        self._end_load(ticket)
        self._generations[ticket.name] += 1
        handle = AdapterHandle(
            name=ticket.name,
            generation=self._generations[ticket.name],
            source=ticket.source,
            facts=facts,
            pinned=ticket.pinned,
            state=AdapterState.READY,
            loaded_at=self._clock(),
        )
        self._uids[facts.uid] += 1
        replaced = self._ready.pop(ticket.name, None)
        if replaced is not None:
            self._retire(replaced)
        self._ready[ticket.name] = handle
        return LoadOutcome(handle, replaced)

    def fail_load(self, ticket: LoadTicket, error: str) -> AdapterInfo:
        """Forget a load: it never existed, and a version it would have replaced goes on. Returns its last state."""
        self._end_load(ticket)
        return AdapterInfo(
            ticket.name, state=AdapterState.FAILED, source=ticket.source, pinned=ticket.pinned, error=error
        )

    # ---- references ----

    def acquire(self, name: str) -> AdapterHandle | None:
        """``acquire_all`` for one adapter."""
        handles = self.acquire_all((name,))
        return None if handles is None else handles[0]

    def acquire_all(self, names: Sequence[str]) -> tuple[AdapterHandle, ...] | None:
        """One reference to each, or none at all. None: one is still loading for the first time; ask again later.

        Raises:
            NotFound: one is not loaded; names the nearest that are.
        """
        for name in names:
            if name not in self._ready and name not in self._loading:
                raise self._unknown(name, "adapters")
        if not all(name in self._ready for name in names):
            return None
        handles = tuple(self._ready[name] for name in names)
        now = self._clock()
        for handle in handles:
            handle.refs += 1
            handle.last_used_at = now
        return handles

    def release(self, handle: AdapterHandle) -> bool:
        """Give one reference back. True: it was the last of a DRAINING version, which is now UNLOADED."""
        assert handle.refs > 0, f"adapter {handle.name} generation {handle.generation} released more than acquired"
        handle.refs -= 1
        handle.last_used_at = self._clock()
        if handle.refs or handle.state is not AdapterState.DRAINING:
            return False
        draining = self._draining[handle.name]
        draining.remove(handle)
        if not draining:
            del self._draining[handle.name]
        self._end(handle)
        return True

    # ---- unloads and pins ----

    def unload(self, name: str) -> AdapterHandle:
        """Take ``name`` away. The version is UNLOADED now, or DRAINING until ``release`` answers True.

        A name that drains already answers with the version that does.

        Raises:
            NotFound: no such adapter.
            Mismatch: it is pinned, or a load of it is in progress.
        """
        if name in self._loading:
            raise Mismatch(f"adapter {name!r} is being loaded; unload it when the load has ended", field="name")
        handle = self._ready.get(name)
        if handle is None:
            draining = self._draining.get(name)
            if draining is None:
                raise self._unknown(name)
            return draining[-1]
        if handle.pinned:
            hint = f"unpin it before unloading (UpdateAdapter, or loraplex adapters unpin {name})"
            raise Mismatch(f"adapter {name!r} is pinned; {hint}", field="name")
        del self._ready[name]
        self._retire(handle)
        return handle

    def set_pinned(self, name: str, pinned: bool) -> AdapterHandle:
        """Pin or unpin the READY version. Raises NotFound: there is none."""
        handle = self.ready(name)
        handle.pinned = pinned
        return handle

    def set_resident(self, handle: AdapterHandle, mode: ResidentMode, merged_bytes: int) -> None:
        """A version is to be kept so, and requests that use it alone are given its merged form of so many bytes; 0:
        they are not."""
        handle.resident_mode, handle.merged_bytes = mode, merged_bytes

    def ready(self, name: str) -> AdapterHandle:
        """The READY version. Raises NotFound: there is none."""
        handle = self._ready.get(name)
        if handle is None:
            raise self._unknown(name)
        return handle

    def loads(self, name: str) -> bool:
        """Whether a load under this name is in progress."""
        return name in self._loading

    def holds(self, uid: str) -> bool:
        """Whether a version with this content is READY or DRAINING; when not, the bank may forget it."""
        return uid in self._uids

    def known(self, uid: str) -> AdapterFacts | None:
        """The facts of a version with this content; None when there is none."""
        if uid not in self._uids:
            return None
        versions = chain(self._ready.values(), chain.from_iterable(self._draining.values()))
        return next(handle.facts for handle in versions if handle.uid == uid)

    def of(self, uid: str) -> tuple[AdapterHandle, ...]:
        """The READY versions with this content."""
        return tuple(handle for handle in self._ready.values() if handle.uid == uid)

    def pins(self, uid: str) -> bool:
        """Whether a READY version with this content is pinned."""
        return any(handle.pinned and handle.uid == uid for handle in self._ready.values())

    # ---- what is there ----

    def knowing(self, token_id: int) -> str:
        """The first name, of those READY, whose vocabulary goes beyond the base's and up to ``token_id``; empty: none.

        Looked for where a request is refused, so it is cheap: among no more than are compared for the nearest name.
        """
        names = (name for name in self._names() if self._ready[name].facts.vocab_size > token_id)
        return min(names, default="")

    def get(self, name: str) -> AdapterInfo:
        """The adapter as users see it. Raises NotFound: no such adapter."""
        handle = self._ready.get(name)
        if handle is not None:
            return self.info(handle)
        if name in self._loading:
            ticket = self._loading[name]
            return AdapterInfo(name, source=ticket.source, pinned=ticket.pinned, state=AdapterState.LOADING)
        if name in self._draining:
            return self.info(self._draining[name][-1])
        raise self._unknown(name)

    def list(self) -> tuple[AdapterInfo, ...]:
        """One entry per name, by name."""
        return tuple(self.get(name) for name in sorted({*self._ready, *self._loading, *self._draining}))

    def info(self, handle: AdapterHandle) -> AdapterInfo:
        """One version as users see it."""
        facts = handle.facts
        if handle.state is AdapterState.UNLOADED:
            residency = Residency.DISK
        else:  # a router is never on a device
            residency = Residency.HOST if facts.chooser is not None else self._residency(facts.uid)
        return AdapterInfo(
            name=handle.name,
            uid=facts.uid,
            kind=facts.kind,
            state=handle.state,
            source=handle.source,
            max_rank=facts.max_rank,
            num_parameters=facts.num_parameters,
            bytes=facts.nbytes,
            coverage=facts.coverage,
            residency=residency,
            pinned=handle.pinned,
            in_flight=handle.refs,
            loaded_at=handle.loaded_at,
            last_used_at=handle.last_used_at,
            generation=handle.generation,
            vocab_size=facts.vocab_size,
            invocation_tokens=facts.invocation_tokens,
            probe=facts.probe,
            text=facts.text,
            template_unused=facts.template_unused,
            invocation_text=facts.invocation_text,
            resident_mode=handle.resident_mode,
            merged_bytes=handle.merged_bytes,
            merge=facts.merge,
            router=None if facts.chooser is None else facts.chooser.info,
        )

    def states(self) -> dict[AdapterState, int]:
        """How many versions are in each state; replaced versions that still drain count."""
        return {
            AdapterState.LOADING: len(self._loading),
            AdapterState.READY: len(self._ready),
            AdapterState.DRAINING: sum(len(handles) for handles in self._draining.values()),
        }

    # ---- private ----

    def _end_load(self, ticket: LoadTicket) -> None:
        assert self._loading.get(ticket.name) is ticket, f"adapter {ticket.name} has no such load in progress"
        del self._loading[ticket.name]

    def _retire(self, handle: AdapterHandle) -> None:
        if handle.refs:
            handle.state = AdapterState.DRAINING
            self._draining.setdefault(handle.name, []).append(handle)
        else:
            self._end(handle)

    def _end(self, handle: AdapterHandle) -> None:
        handle.state = AdapterState.UNLOADED
        self._uids[handle.uid] -= 1
        if not self._uids[handle.uid]:
            del self._uids[handle.uid]

    def _unknown(self, name: str, field: str = "name") -> NotFound:
        if name in self._draining:
            return NotFound(f"adapter {name!r} is being unloaded and takes no new requests", field=field)
        near = difflib.get_close_matches(name, self._names(), n=3)
        loaded = f"did you mean {', '.join(near)}?" if near else self._loaded()
        return NotFound(f"adapter {name!r} is not loaded; {loaded}", field=field)

    def _loaded(self) -> str:
        if not self._ready:
            return "no adapter is loaded"
        names = ", ".join(islice(self._ready, _MAX_SHOWN))
        rest = len(self._ready) - _MAX_SHOWN
        return f"loaded are {names}" + (f" and {rest} more" if rest > 0 else "")

    def _names(self) -> Iterable[str]:
        return islice(self._ready, _MAX_COMPARED)
