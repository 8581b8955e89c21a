"""The events of one generation on their way to its reader. Touched by the front end's asyncio loop alone."""

from __future__ import annotations

import asyncio

from loraplex.engine.messages import TokenEvent


class EventStream:
    """The events of one generation that its reader has not taken yet. Slow readers get them merged."""

    __slots__ = ("_events", "_waiter", "over")

    def __init__(self) -> None:
        self._events: list[TokenEvent] = []
        self._waiter: asyncio.Future[None] | None = None
        self.over = False

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        self.over = self.over or event.terminal
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> TokenEvent:
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._waiter = None
        events, self._events = self._events, []
        return events[0] if len(events) == 1 else _merged(events)


def _merged(events: list[TokenEvent]) -> TokenEvent:
    first, last = events[0], events[-1]
    return TokenEvent(
        ticket=first.ticket,
        token_ids=tuple(t for e in events for t in e.token_ids),
        logprobs=tuple(p for e in events for p in e.logprobs),
        prompt_logprobs=tuple(p for e in events for p in e.prompt_logprobs),
        adapters=first.adapters,
        routing=first.routing,
        finish=last.finish,
        failure=last.failure,
        usage=next((e.usage for e in reversed(events) if e.usage is not None), None),
    )
