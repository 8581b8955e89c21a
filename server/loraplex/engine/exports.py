"""Exports of adapters: who asked, which version is held meanwhile, and what they are told.

Owned by the engine core, beside the adapter desk, which counts the references: a version that is being exported is in
use, so that an unload waits for it. What is written and where is the loader's thread's business.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from loraplex.adapters.registry import AdapterHandle
from loraplex.engine.desk import AdapterDesk
from loraplex.engine.loader import AdapterLoader, ExportJob, ExportPiece
from loraplex.engine.messages import ExportAdapter
from loraplex.engine.routing import check_has_weights
from loraplex.errors import LoraplexError, OverCapacity
from loraplex.types import Export

log = logging.getLogger("loraplex.adapters")

#: exports that may wait or run at once; they run one after the other
_MAX_EXPORTS: Final = 8
_RETRY_AFTER_S: Final = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    """An export that has not ended."""

    frontend: bytes
    op: int
    handle: AdapterHandle
    destination: str
    began_s: float


class Exports:
    """Those that have not ended, by the key that the loader knows them by."""

    def __init__(self, desk: AdapterDesk, loader: AdapterLoader) -> None:
        self._desk = desk
        self._loader = loader
        self._pending: dict[int, _Pending] = {}
        self._keys = itertools.count()

    def begin(self, frontend: bytes, message: ExportAdapter) -> None:
        """Queue one; progress is told as it comes, and the Reply when it is there or was refused."""
        try:
            if len(self._pending) >= _MAX_EXPORTS:
                raise OverCapacity(
                    f"{len(self._pending)} exports run or wait already; allowed are {_MAX_EXPORTS}",
                    retry_after_s=_RETRY_AFTER_S,
                )
            handle = self._hold(message.name)
        except LoraplexError as error:
            self._desk.answers.refuse(frontend, message.op, error)
            return
        key = next(self._keys)
        self._pending[key] = _Pending(frontend, message.op, handle, message.destination, time.monotonic())
        export = Export(
            name=message.name,
            source=handle.source,
            uid=handle.uid,
            destination=message.destination,
            format=message.format,
            max_shard_bytes=message.max_shard_bytes,
            quantization=message.quantization,
        )
        self._loader.begin(ExportJob(key, export))

    def cancel(self, frontend: bytes, op: int) -> None:
        """Whoever asked does not want it any more; one that is over is ignored."""
        self._cancel_where(lambda one: one.frontend == frontend and one.op == op)

    def abort(self, handle: AdapterHandle) -> None:
        """End the exports of a version."""
        self._cancel_where(lambda one: one.handle is handle)

    def drop_frontend(self, frontend: bytes) -> None:
        """A front end is gone, and with it whoever asked it for exports."""
        self._cancel_where(lambda one: one.frontend == frontend)

    def turn(self) -> None:
        """Tell what has come of them."""
        for piece in self._loader.take_pieces():
            pending = self._pending[piece.key]
            if piece.progress is not None:
                self._desk.answers.exporting(pending.frontend, pending.op, piece.progress)
            else:
                self._end(self._pending.pop(piece.key), piece)

    def close(self) -> None:
        """No more pieces are run, and nothing half-made stays."""
        if self._pending:
            self._loader.close()

    def _hold(self, name: str) -> AdapterHandle:
        """The version that is to be written. Raises what holding it does; InvalidRequest: it is a router."""
        handle = self._desk.versions.hold(name)
        try:
            check_has_weights(handle, "export", "name")
        except LoraplexError:
            self._desk.versions.put_back(handle)
            raise
        return handle

    def _end(self, pending: _Pending, piece: ExportPiece) -> None:
        handle, answers = pending.handle, self._desk.answers
        if piece.error is None:
            seconds = time.monotonic() - pending.began_s
            log.info(
                "adapter %s is exported to %s: uid %s, %.1f s", handle.name, pending.destination, handle.uid, seconds
            )
            answers.reply(pending.frontend, pending.op)
        else:
            if not isinstance(piece.error, LoraplexError):
                log.error("exporting adapter %s to %s", handle.name, pending.destination, exc_info=piece.error)
            answers.refuse(pending.frontend, pending.op, piece.error)
        self._desk.versions.put_back(handle)

    def _cancel_where(self, wanted: Callable[[_Pending], bool]) -> None:
        for key, pending in self._pending.items():
            if wanted(pending):
                self._loader.cancel(key)
