"""Which adapter it is, by its content: the config, the bytes of the tensors' file, and what it has of text of its own.

Two directories with one uid are lowered to the same; so a copy is known as one without its tensors being looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from typing import Final, Protocol

from loraplex.adapters.reading.config_file import AdapterConfig, read_config
from loraplex.adapters.reading.safetensors_file import Hash
from loraplex.adapters.reading.source import TENSOR_FILE, AdapterDir
from loraplex.adapters.text.own_text import OwnTexts

#: hex digits of the content digest that are kept: 128 bits
UID_HEX_DIGITS: Final = 32
#: of the tensors' file, at a time
_PIECE_BYTES: Final = 1 << 20
#: more than any adapter knows: a vocabulary that its text is checked against elsewhere
_ANY_VOCABULARY: Final = 1 << 62


class Digest(Hash, Protocol):
    """A running one, and what it has come to."""

    def hexdigest(self) -> str: ...


def begun_with(config: AdapterConfig) -> Digest:
    """A digest that the config went through; the tensors' file and then the text go after it."""
    # keys in order, but not those of patterns, of which the first that matches counts
    canonical = json.dumps(dict(sorted(config.values.items())), separators=(",", ":")).encode()
    return hashlib.sha256(len(canonical).to_bytes(8, "little") + canonical)


def ended(digest: Digest) -> str:
    """The uid that a digest of all content comes to."""
    return digest.hexdigest()[:UID_HEX_DIGITS]


def uid_of(
    directory: AdapterDir, texts: OwnTexts | None, also_known: frozenset[str], give_way: Callable[[], None]
) -> str:
    """The uid that a load of ``directory`` finds. ``also_known``: adapter types that PEFT does not have.

    Raises:
        InvalidAdapter, UnsupportedFeature, Mismatch, NotPermitted: its config or its text is no adapter's, or a file
            is missing.
    """
    digest = begun_with(read_config(directory, also_known))
    piece = memoryview(bytearray(_PIECE_BYTES))
    with directory.open(TENSOR_FILE) as fd:
        while size := os.readv(fd, [piece]):
            digest.update(piece[:size])
            give_way()
    if texts is not None:
        digest.update(texts.read(directory, _ANY_VOCABULARY).digest)
    return ended(digest)
