"""Range checks on request fields: each raises InvalidRequest naming the field, its value and what is allowed."""

from __future__ import annotations

import math
import re
from typing import Final, NoReturn

from loraplex.errors import InvalidRequest
from loraplex.types import NAME_PATTERN

_NAME: Final = re.compile(NAME_PATTERN)
_SHOWN_CHARS: Final = 64


def refusal(field: str, problem: str) -> InvalidRequest:
    """The error that says what is wrong with ``field``."""
    return InvalidRequest(f"{field}: {problem}", field=field)


def refuse(field: str, problem: str) -> NoReturn:
    """Raise it."""
    raise refusal(field, problem)


def number(field: str, value: float, low: float, high: float) -> float:
    """``value`` if it is finite and within [low, high]."""
    if not math.isfinite(value) or not low <= value <= high:
        refuse(field, f"{value:g} is not allowed; it must be a number from {low:g} to {high:g}")
    return value


def at_most(field: str, value: int, high: int) -> int:
    """``value`` if it is not above ``high``."""
    if value > high:
        refuse(field, f"{value} is too large; at most {high} is allowed")
    return value


def count(field: str, num: int, high: int) -> None:
    """Refuse a list of more than ``high`` entries, before a Python list is made of it."""
    if num > high:
        refuse(field, f"has {num} entries; at most {high} are allowed")


def name(field: str, value: str) -> str:
    """``value`` if it may reach labels, logs and paths."""
    if not _NAME.fullmatch(value):
        refuse(
            field,
            f"{shown(value)} is not a name; allowed are 1 to 128 letters, digits and . _ : / @ + -, "
            "beginning with a letter or digit",
        )
    return value


def token_id(field: str, value: int, vocab_size: int) -> int:
    """``value`` if it is in the vocabulary."""
    if value >= vocab_size:
        refuse(field, f"token id {value} is outside the vocabulary; allowed are 0 to {vocab_size - 1}")
    return value


def shown(value: str) -> str:
    """``value`` quoted, printable and short enough for a message."""
    return ascii(value if len(value) <= _SHOWN_CHARS else value[:_SHOWN_CHARS] + "...")
