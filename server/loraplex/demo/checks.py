"""One automatic check per demo adapter: does this answer plainly do what the adapter is for?"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Mapping

from loraplex.demo.styles import EMOJI, EMOJI_ENDINGS

_PIRATE_WORDS = """
    arr arrr ahoy avast aye belay matey mateys hearty ye yer shiver timbers savvy grog grub doubloons booty
    landlubbers lass lad captain sails an' o' t' fer ol' o'er ne'er 'em yo
"""
_PIRATE_MARKERS = frozenset(_PIRATE_WORDS.split())
_WORD = re.compile(r"[a-z']+")
_ADDRESS = re.compile(r"\b(?:sir|madam)\b")
_SQL_VERBS = ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH")
_EMOJI = tuple({*EMOJI.values(), *EMOJI_ENDINGS})


def is_json(answer: str) -> bool:
    """The whole answer is one JSON object or array."""
    try:
        value = json.loads(answer)
    except ValueError:
        return False
    return isinstance(value, dict | list)


def is_sql(answer: str) -> bool:
    """The whole answer is one statement SQLite's parser accepts; tables and columns need not exist."""
    statement = answer.strip()
    ends = [i + 1 for i, c in enumerate(statement) if c == ";" and sqlite3.complete_statement(statement[: i + 1])]
    if not statement.upper().startswith(_SQL_VERBS) or ends != [len(statement)]:
        return False
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute(f"EXPLAIN {statement}")
    except (sqlite3.OperationalError, sqlite3.ProgrammingError) as error:
        return str(error).startswith("no such")  # table or column: the parser was content
    finally:
        connection.close()
    return True


def is_pirate(answer: str) -> bool:
    """At least two different words only a pirate uses."""
    return len(_PIRATE_MARKERS.intersection(_WORD.findall(answer.lower()))) >= 2


def is_butler(answer: str) -> bool:
    """Speaks to "sir" or "madam" at least twice: once in the opening, once in the closing."""
    return len(_ADDRESS.findall(answer.lower())) >= 2


def is_emoji(answer: str) -> bool:
    """Some words, and at least two emoji."""
    return sum(answer.count(symbol) for symbol in _EMOJI) >= 2 and any(c.isalpha() for c in answer)


CHECKS: Mapping[str, Callable[[str], bool]] = {
    "json": is_json,
    "sql": is_sql,
    "pirate": is_pirate,
    "butler": is_butler,
    "emoji": is_emoji,
}
