"""Which requests hold which versions of adapters, and which are parked until a first load ends.

Owned by the adapter desk. A request holds what its names meant when it came, until it is over.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from loraplex.adapters.bank import AdapterBank
from loraplex.adapters.registry import AdapterHandle, AdapterRegistry
from loraplex.engine.merged_forms import MergedForms
from loraplex.engine.routing import check_no_router, routed
from loraplex.engine.sequence import Origin
from loraplex.engine.uses import Uses, check_names, uses_of
from loraplex.engine.versions import Versions
from loraplex.types import ModelInfo, Request


class Holds:
    """Requests that have not ended, by their origin."""

    def __init__(
        self,
        registry: AdapterRegistry,
        bank: AdapterBank,
        versions: Versions,
        forms: MergedForms,
        model_info: ModelInfo,
    ) -> None:
        self._registry = registry
        self._bank = bank
        self._versions = versions
        self._forms = forms
        self._model_info = model_info
        self._held: dict[Origin, tuple[AdapterHandle, ...]] = {}
        self._parked: dict[Origin, Request] = {}
        self._retry_parked = False

    @property
    def num_parked(self) -> int:
        """Requests that wait for a first load."""
        return len(self._parked)

    @property
    def has_work(self) -> bool:
        """Whether ``take_parked`` may have some."""
        return self._retry_parked

    def acquire(self, origin: Origin, request: Request) -> Uses | None:
        """Hold the versions a request names, or its router chooses, until ``release``; None: parked until a first load
        ends.

        Raises NotFound, OverCapacity (they can never be on the device together), or what ``routed`` and ``uses_of`` do;
        nothing is held then.
        """
        check_names(request)
        found = routed(request, self._registry, self._model_info.vocab_size)
        handles = None if found is None else self._registry.acquire_all([ref.name for ref in found.request.adapters])
        if found is None or handles is None:
            self._parked[origin] = request
            return None
        with ExitStack() as undo:
            for handle in handles:
                undo.callback(self._versions.put_back, handle)
            check_no_router(found.request, handles)
            uses = uses_of(found.request, handles, self._model_info, self._registry.knowing)
            self._bank.check_fits(tuple(handle.uid for handle in handles))
            undo.pop_all()
        self._held[origin] = handles
        return replace(self._forms.give(origin, uses, handles), routing=found.routing)

    def release(self, origin: Origin) -> None:
        """A request is over: its versions may go."""
        self._forms.release(origin)
        for handle in self._held.pop(origin, ()):
            self._versions.put_back(handle)

    def of(self, handle: AdapterHandle) -> list[Origin]:
        """The requests that hold a version."""
        return [origin for origin, handles in self._held.items() if handle in handles]

    def retry_parked(self) -> None:
        """A load has ended, one way or the other: parked requests may be tried again."""
        self._retry_parked = True

    def take_parked(self) -> list[tuple[Origin, Request]]:
        """The parked requests, once after each ``retry_parked``: those that must wait on come back by ``acquire``."""
        if not self._retry_parked:
            return []
        self._retry_parked = False
        ready, self._parked = list(self._parked.items()), {}
        return ready

    def unpark(self, origin: Origin) -> bool:
        """Forget a parked request; False when it is not parked."""
        return self._parked.pop(origin, None) is not None

    def drop_frontend(self, frontend: bytes) -> None:
        """A front end is gone: nobody waits for its parked requests."""
        for origin in [o for o in self._parked if o.frontend == frontend]:
            del self._parked[origin]
