"""Finds stop strings in text that arrives in pieces. Knows nothing of tokens."""

from __future__ import annotations


class StopMatcher:
    """Passes text on, holding back only what may still become a stop string.

    The stop string that ends first wins; of two that end together, the longer. The outcome does not depend on how the
    text was cut into pieces.
    """

    def __init__(self, stop: tuple[str, ...], keep: bool) -> None:
        self._stop = stop
        self._keep = keep
        self._max_held = max(map(len, stop), default=1) - 1
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Text that is safe to show. After a hit, which sets ``hit``, the rest of the text is dropped."""
        buffer = self._held + text
        found = [(buffer.find(stop) + len(stop), -len(stop)) for stop in self._stop if stop in buffer]
        if found:
            end, negative_length = min(found)
            self.hit = True
            self._held = ""
            return buffer[:end] if self._keep else buffer[: end + negative_length]
        num_held = self._num_possible(buffer)
        self._held = buffer[len(buffer) - num_held :]
        return buffer[: len(buffer) - num_held]

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _num_possible(self, buffer: str) -> int:
        """Length of the longest end of ``buffer`` that begins a stop string."""
        for length in range(min(self._max_held, len(buffer)), 0, -1):
            tail = buffer[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
