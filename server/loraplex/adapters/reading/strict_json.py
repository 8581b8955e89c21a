"""JSON from strangers, read strictly: what ``json.loads`` lets pass and we do not.

Refused: duplicate keys, NaN and Infinity, numbers that overflow a float, nesting deeper than MAX_DEPTH (a value that
could just be read might not be written or shown), bytes or escapes that are not UTF-8, and anything but an object at
the top.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Final

from loraplex.errors import InvalidAdapter

MAX_DEPTH: Final = 100


def parse_object(raw: bytes, where: str) -> dict[str, object]:
    """The JSON object in ``raw``; ``where`` names the file in messages.

    Raises:
        InvalidAdapter: what is wrong, and in which file.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        _check_depth(value)
        if b"\\u" in raw:  # half of a surrogate pair, which no UTF-8 has
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise InvalidAdapter(f"{where}: JSON is nested too deeply") from None
    except ValueError as error:
        raise InvalidAdapter(f"{where}: not valid JSON: {str(error)[:200]}") from None
    if type(value) is not dict:
        raise InvalidAdapter(f"{where}: expected a JSON object at the top, got {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:100]!r} appears twice in one object")
            seen.add(key)
    return found


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, (dict, list))]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:40]} overflows")
    return value
