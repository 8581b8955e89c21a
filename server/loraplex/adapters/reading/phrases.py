"""What files of strangers say, for messages: short, whatever it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_SHOWN_CHARS: Final = 80
_NAMES_SHOWN: Final = 4


def shown(value: object) -> str:
    """A value of a config file."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}..."


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
