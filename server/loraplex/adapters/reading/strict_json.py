"""JSON from strangers, read strictly: what ``json.loads`` lets pass and we do not.

Refused: duplicate keys, NaN and Infinity, numbers that overflow a float, nesting that exhausts the stack, bytes that
are not UTF-8, and anything but an object at the top.
"""

from __future__ import annotations

import json
import math

from loraplex.errors import InvalidAdapter


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


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:40]} overflows")
    return value
