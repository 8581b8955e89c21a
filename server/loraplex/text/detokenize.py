"""From token ids to the text a user reads, one object per request: whole characters, cut at stop strings.

Does not know requests, engines or protobuf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from loraplex.text.stop import StopMatcher


class TokenStream(Protocol):
    """Decodes one sequence (``ByteStream``, ``WindowStream``)."""

    def push(self, token_ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class StopText:
    """What ends a request's text. ``min_tokens`` tokens pass unsearched; ``keep`` leaves the stop string in."""

    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    keep: bool = False


class Detokenizer:
    """Incremental text of one request; O(1) amortised a token.

    Example::

        text, used = detokenizer.push(token_ids)
        if detokenizer.stopped:  # a stop string was completed by token_ids[used - 1]
            ...
        text += detokenizer.flush()
    """

    def __init__(self, stream: TokenStream, rule: StopText) -> None:
        self._stream = stream
        self._num_unsearched = rule.min_tokens if rule.stop else 0
        self._matcher = StopMatcher(rule.stop, rule.keep) if rule.stop else None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._matcher is not None and self._matcher.hit

    def push(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Text that became final with these tokens, and how many of the tokens were used.

        Fewer than all are used only when a stop string ends within them.
        """
        matcher = self._matcher
        if matcher is None:
            return self._stream.push(token_ids), len(token_ids)
        if matcher.hit:
            return "", 0
        pieces: list[str] = []
        for index, token_id in enumerate(token_ids):
            text = self._stream.push((token_id,))
            if self._num_unsearched > 0:
                self._num_unsearched -= 1
                pieces.append(text)
                continue
            pieces.append(matcher.push(text) if text else "")
            if matcher.hit:
                return "".join(pieces), index + 1
        return "".join(pieces), len(token_ids)

    def flush(self) -> str:
        """The text still held back, at the end of the sequence; empty after a stop string."""
        if self._matcher is None:
            return self._stream.flush()
        if self._matcher.hit:
            return ""
        rest = self._stream.flush()
        shown = self._matcher.push(rest) if rest else ""
        return shown if self._matcher.hit else shown + self._matcher.flush()
