"""Who still needs a version of an adapter, and what goes with the last of them: its tensors, its text, and the wait of
those who unloaded it.

Owned by the adapter desk. The registry counts the references; here is what follows from the count.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from loraplex.adapters.bank import AdapterBank
from loraplex.adapters.registry import AdapterHandle, AdapterRegistry
from loraplex.adapters.text.spool import TextSpool
from loraplex.engine.answers import Answers
from loraplex.errors import Mismatch


@dataclass(frozen=True, slots=True, eq=False)
class _Unload:
    """An unload that waits for the version's last request."""

    frontend: bytes
    op: int
    handle: AdapterHandle


class Versions:
    """Forgets what nobody needs any more: no request, no export, no load in progress and no other name."""

    def __init__(self, registry: AdapterRegistry, bank: AdapterBank, texts: TextSpool, answers: Answers) -> None:
        self._registry = registry
        self._bank = bank
        self._texts = texts
        self._answers = answers
        self._unloads: list[_Unload] = []
        self._claims: Counter[str] = Counter()  # uid -> loads in progress that have read it

    def hold(self, name: str) -> AdapterHandle:
        """Hold the version that a name means until ``put_back``. Raises NotFound; Mismatch: it is not loaded yet."""
        handle = self._registry.acquire(name)
        if handle is None:
            raise Mismatch(f"adapter {name!r} is being loaded; wait until it can be served", field="name")
        return handle

    def put_back(self, handle: AdapterHandle) -> None:
        """A version that was held may go."""
        if self._registry.release(handle):
            self.ended(handle)

    def answer_at_end(self, frontend: bytes, op: int, handle: AdapterHandle) -> None:
        """Answer when a version that was taken away is UNLOADED."""
        self._unloads.append(_Unload(frontend, op, handle))

    def ended(self, handle: AdapterHandle) -> None:
        """A version is UNLOADED: forget its tensors if no other name has the same content, and answer who waits."""
        info = self._registry.info(handle)
        self.forget_if_unused(handle.uid)
        self._texts.drop(handle.facts.text)
        self._answers.changed(info)
        for unload in [u for u in self._unloads if u.handle is handle]:
            self._unloads.remove(unload)
            self._answers.reply(unload.frontend, unload.op, info)

    def claim(self, uid: str) -> None:
        """A load has read this content: it is kept, pinned or not as it is, until ``give_up``."""
        self._claims[uid] += 1

    def give_up(self, uid: str) -> None:
        """A load that claimed it is over."""
        self._claims[uid] -= 1
        if not self._claims[uid]:
            del self._claims[uid]

    def forget_if_unused(self, uid: str) -> None:
        """Forget a content's tensors where no name has it, or keep them as pinned as its names are."""
        if uid in self._claims or not self._bank.holds(uid):
            return
        if self._registry.holds(uid):
            self._bank.set_pinned(uid, self._registry.pins(uid))
        else:
            self._bank.remove(uid)
