"""An adapter's own text as it travels: what its files say that the base model's do not, in one file.

Written by the engine, which has checked it, and read by front ends. Knows no tokenizer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from loraplex.types import OwnText

#: hex digits of a digest that are kept: 128 bits
_HEX_DIGITS: Final = 32


class TextPack(msgspec.Struct, frozen=True, omit_defaults=True):
    """None stands for the base model's own.

    ``tokenizer``: a tokenizer.json, without its model (vocabulary and merges) where ``shares_model`` says that it is
    the base's. ``special_tokens``: what templates know as ``bos_token`` and the like.
    """

    tokenizer: bytes | None = None
    shares_model: bool = False
    chat_template: str | None = None
    special_tokens: dict[str, str] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether all of it is the base model's."""
        return self == TextPack()

    def encode(self) -> bytes:
        """The content of its file; equal packs give equal bytes."""
        return _encoder.encode(self)


@dataclass(frozen=True, slots=True)
class AdapterText:
    """What of an adapter's text is its own: ``facts`` for everybody, ``pack`` for front ends."""

    facts: OwnText
    pack: TextPack


def read_pack(file: Path) -> TextPack:
    """The pack in ``file``. Raises OSError."""
    return _decoder.decode(file.read_bytes())


def pack_file(spool: Path, digest: str) -> Path:
    """Where the pack of one digest lies in a spool."""
    return spool / f"{digest}.text"


def digest_of(*parts: bytes) -> str:
    """One digest over several byte strings; where each ends counts."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.hexdigest()[:_HEX_DIGITS]


_encoder: Final = msgspec.msgpack.Encoder(order="sorted")
_decoder: Final = msgspec.msgpack.Decoder(TextPack)
