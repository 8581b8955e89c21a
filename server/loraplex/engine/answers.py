"""What there is to say about adapters: replies to whoever asked for an operation, and changes that all are told of.

Collected by the adapter desk during a turn, taken by the core when it sends.
"""

from __future__ import annotations

from loraplex.engine.messages import AdapterChanged, Failure, Reply, ToFrontEnd
from loraplex.types import AdapterInfo


class Answers:
    """Replies by front end, and changes, each in the order they came."""

    def __init__(self) -> None:
        self._replies: list[tuple[bytes, ToFrontEnd]] = []
        self._changes: list[ToFrontEnd] = []

    def reply(self, frontend: bytes, op: int, *adapters: AdapterInfo, load_s: float = 0.0) -> None:
        """An operation is over, and came to these adapters."""
        self._replies.append((frontend, Reply(op, adapters, load_s=load_s)))

    def refuse(self, frontend: bytes, op: int, error: Exception) -> None:
        """An operation failed."""
        self._replies.append((frontend, Reply(op, failure=Failure.of(error))))

    def changed(self, adapter: AdapterInfo) -> None:
        """An adapter is no longer what all were told of."""
        self._changes.append(AdapterChanged(adapter))

    def take_replies(self) -> list[tuple[bytes, ToFrontEnd]]:
        """Replies since the last call, by front end."""
        replies, self._replies = self._replies, []
        return replies

    def take_changes(self) -> list[ToFrontEnd]:
        """Changes since the last call, for all front ends."""
        changes, self._changes = self._changes, []
        return changes
