"""Token ids to text for any other decoder (metaspace with byte fallback, WordPiece ...): a sliding window is decoded.

The text of a token may depend on the one before it (a leading space is stripped at the start only), so a window that
begins at the last token known to show text is decoded with and without the new tokens; the difference is new text.
Does not know stop strings or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer as Backend

#: a UTF-8 character has at most four bytes: what does not decode after four tokens never will
_MAX_OPEN: Final = 4
_REPLACEMENT: Final = "\ufffd"


class WindowTable:
    """The decoder of one tokenizer, in the role of ``ByteTable``."""

    def __init__(self, backend: Backend, special_ids: frozenset[int]) -> None:
        self._backend = backend
        self._special_ids = special_ids

    def raw(self, token_id: int) -> bytes:
        """The token's text even when it is special; an id without a token has none."""
        return (self._backend.id_to_token(token_id) or "").replace("\u2581", " ").encode()

    def open(self) -> WindowStream:
        """A decoder for one sequence."""
        return WindowStream(self._backend, self._special_ids)


class WindowStream:
    """Decodes one sequence in O(1) amortised a token; incomplete characters are held back."""

    def __init__(self, backend: Backend, special_ids: frozenset[int]) -> None:
        self._backend = backend
        self._special_ids = special_ids
        self._window: list[int] = []
        self._num_shown = 0  # tokens of the window whose text is out
        self._shown = ""  # that text
        self._num_open = 0  # tokens in a row that left a character incomplete

    def push(self, token_ids: Sequence[int]) -> str:
        """The whole characters that these tokens complete."""
        # Token by token, so that the text does not depend on how tokens are grouped.
        return "".join([self._push_one(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self._decode()[len(self._shown) :]

    def _push_one(self, token_id: int) -> str:
        if token_id in self._special_ids:  # shows nothing, and must not make the window grow
            return ""
        self._window.append(token_id)
        text = self._decode()
        if len(text) <= len(self._shown):
            return ""
        if text.endswith(_REPLACEMENT) and self._num_open + 1 < _MAX_OPEN:
            self._num_open += 1
            return ""
        self._num_open = 0
        new = text[len(self._shown) :]
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        self._shown = self._decode()
        return new

    def _decode(self) -> str:
        return str(self._backend.decode(self._window, skip_special_tokens=True))
