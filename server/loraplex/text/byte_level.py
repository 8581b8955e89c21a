"""Token ids to text for byte-level BPE: each token is a run of bytes, so decoding is exact and O(1) a token.

Knows the byte alphabet of GPT-2 (``bytes_to_unicode``) and how the ``tokenizers`` library's ByteLevel decoder treats
tokens outside it. Does not know stop strings or requests.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tokenizers import Tokenizer as Backend


class ByteTable:
    """Token id -> its bytes, filled as tokens are met. Special tokens are empty. One per tokenizer."""

    def __init__(self, backend: Backend, special_ids: frozenset[int]) -> None:
        self._backend = backend
        self._special_ids = special_ids
        self._byte_of = _byte_of_character()
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            known = b"" if token_id in self._special_ids else self.raw(token_id)
            self._known[token_id] = known
        return known

    def raw(self, token_id: int) -> bytes:
        """The token's bytes even when it is special; an id without a token has none."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes([self._byte_of[character] for character in token])
        except KeyError:  # an added token with characters outside the byte alphabet stands for its own text
            return token.encode()

    def open(self) -> ByteStream:
        """A decoder for one sequence."""
        return ByteStream(self)


class ByteStream:
    """Decodes one sequence; characters whose bytes are not all there yet are held back."""

    def __init__(self, table: ByteTable) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """The whole characters that these tokens complete."""
        table = self._table
        return self._decoder.decode(b"".join([table[token_id] for token_id in token_ids]))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self._decoder.decode(b"", final=True)


def _byte_of_character() -> dict[str, int]:
    """The inverse of GPT-2's table: printable bytes stand for themselves, the others for U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in table.values()]
    table.update({chr(0x100 + offset): byte for offset, byte in enumerate(rest)})
    return table
