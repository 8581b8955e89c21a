"""Regular expressions from strangers, matched in bounded time.

PEFT configs hold patterns (target_modules, rank_pattern ...). Python's ``re`` backtracks: one hostile pattern would
hold the interpreter, and every running request, for hours. This matcher moves a set of positions (the bits of an int)
through the pattern, counts its steps, and gives up with an error at a bound. It answers only "does the whole text
match", for which greedy and lazy are the same, and agrees with ``re.fullmatch`` on all it accepts; what it does not
read (back-references, look-behind, flags, possessive and atomic groups, escapes by number) is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

MAX_PATTERN_CHARS: Final = 2048
_MAX_DEPTH: Final = 40
_MAX_REPEAT: Final = 1000
_CLASSES: Final[dict[str, Callable[[str], bool]]] = {
    "d": str.isdecimal,
    "D": lambda c: not c.isdecimal(),
    "w": lambda c: c.isalnum() or c == "_",
    "W": lambda c: not (c.isalnum() or c == "_"),
    "s": str.isspace,
    "S": lambda c: not c.isspace(),
}


class PatternError(ValueError):
    """The pattern is malformed, uses what is not read, or takes too many steps."""


class Steps:
    """How many more node visits are allowed; shared by all patterns of one config."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def spend(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise PatternError("the patterns take too long to match; use plain module names")


class Pattern:
    """A parsed pattern."""

    def __init__(self, source: str, steps: Steps) -> None:
        """Raises PatternError: malformed, or uses what is not read."""
        if len(source) > MAX_PATTERN_CHARS:
            raise PatternError(f"pattern of {len(source)} characters; at most {MAX_PATTERN_CHARS} are allowed")
        self._node = _Parser(source).parse()
        self._steps = steps

    def fullmatch(self, text: str) -> bool:
        """Whether the whole of ``text`` (no line breaks) matches. Raises PatternError: too many steps."""
        subject = _Subject(text, self._steps)
        return bool(self._node.step(subject, 1) >> len(text) & 1)


class _Subject:
    """The text, and for each of its characters the positions it stands at."""

    def __init__(self, text: str, steps: Steps) -> None:
        self.text = text
        self.steps = steps
        self.positions: dict[str, int] = {}
        for index, char in enumerate(text):
            self.positions[char] = self.positions.get(char, 0) | 1 << index


class _Node(Protocol):
    """A part of a pattern: from the positions in ``mask`` it leads to the positions returned."""

    def step(self, subject: _Subject, mask: int) -> int: ...


@dataclass(frozen=True, slots=True)
class _Chars:
    accepts: Callable[[str], bool]

    def step(self, subject: _Subject, mask: int) -> int:
        subject.steps.spend()
        found = 0
        for char, positions in subject.positions.items():
            if self.accepts(char):
                found |= positions
        return (mask & found) << 1


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: tuple[_Node, ...]

    def step(self, subject: _Subject, mask: int) -> int:
        for part in self.parts:
            if not mask:
                break
            mask = part.step(subject, mask)
        return mask


@dataclass(frozen=True, slots=True)
class _Branch:
    options: tuple[_Node, ...]

    def step(self, subject: _Subject, mask: int) -> int:
        found = 0
        for option in self.options:
            subject.steps.spend()
            found |= option.step(subject, mask)
        return found


@dataclass(frozen=True, slots=True)
class _Repeat:
    body: _Node
    low: int
    high: int | None

    def step(self, subject: _Subject, mask: int) -> int:
        for _ in range(self.low):
            subject.steps.spend()
            mask = self.body.step(subject, mask)
        found = frontier = mask
        rounds = self.low
        while frontier and (self.high is None or rounds < self.high):
            subject.steps.spend()
            frontier = self.body.step(subject, frontier) & ~found
            found |= frontier
            rounds += 1
        return found


@dataclass(frozen=True, slots=True)
class _Where:
    """A zero-width condition on the position: ``^``, ``$``, ``\\b``."""

    holds: Callable[[str, int], bool]

    def step(self, subject: _Subject, mask: int) -> int:
        subject.steps.spend()
        return sum(1 << at for at in range(len(subject.text) + 1) if mask >> at & 1 and self.holds(subject.text, at))


@dataclass(frozen=True, slots=True)
class _Ahead:
    body: _Node
    negative: bool

    def step(self, subject: _Subject, mask: int) -> int:
        found = 0
        for at in range(len(subject.text) + 1):
            bit = mask & 1 << at
            if bit and bool(self.body.step(subject, bit)) is not self.negative:
                found |= bit
        return found


def _is_word(text: str, at: int) -> bool:
    return 0 <= at < len(text) and _CLASSES["w"](text[at])


def _at_border(text: str, at: int) -> bool:
    return _is_word(text, at - 1) is not _is_word(text, at)


def _at_start(text: str, at: int) -> bool:
    return at == 0


def _at_end(text: str, at: int) -> bool:
    return at == len(text)


_CONDITIONS: Final[dict[str, Callable[[str, int], bool]]] = {
    "b": _at_border,
    "A": _at_start,
    "Z": _at_end,
}


class _Parser:
    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0
        self._depth = 0

    def parse(self) -> _Node:
        node = self._branch()
        if self._at < len(self._source):
            raise PatternError(f"unbalanced ')' in pattern {self._source!r}")
        return node

    def _peek(self, count: int = 1) -> str:
        return self._source[self._at : self._at + count]

    def _take(self, text: str) -> bool:
        if text and self._source.startswith(text, self._at):
            self._at += len(text)
            return True
        return False

    def _next(self) -> str:
        if self._at >= len(self._source):
            raise PatternError(f"pattern {self._source!r} ends too early")
        self._at += 1
        return self._source[self._at - 1]

    def _branch(self) -> _Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise PatternError(f"pattern {self._source[:80]!r} nests deeper than {_MAX_DEPTH} groups")
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        self._depth -= 1
        return options[0] if len(options) == 1 else _Branch(tuple(options))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            zero_width, atom = self._atom()
            parts.append(self._quantified(zero_width, atom))
        return _Sequence(tuple(parts))

    def _quantified(self, zero_width: bool, atom: _Node) -> _Node:
        bounds = self._bounds()
        if bounds is None:
            return atom
        self._take("?")
        if zero_width or self._peek() == "+" or self._bounds() is not None:
            raise PatternError(f"pattern {self._source!r}: a repetition of nothing, of another one, or possessive")
        return _Repeat(atom, *bounds)

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        close = self._source.find("}", self._at)
        if self._peek() != "{" or close < 0:
            return None
        low, comma, high = self._source[self._at + 1 : close].partition(",")
        if not all(part == "" or (part.isascii() and part.isdigit()) for part in (low, high)) or not (low or comma):
            return None
        if len(low) > 4 or len(high) > 4 or int(low or 0) > _MAX_REPEAT or int(high or 0) > _MAX_REPEAT:
            raise PatternError(f"pattern {self._source!r} repeats more than {_MAX_REPEAT} times")
        self._at = close + 1
        least, most = int(low or 0), (int(high) if high else None) if comma else int(low)
        if most is not None and most < least:
            raise PatternError(f"pattern {self._source!r}: a repetition's bounds are reversed")
        return least, most

    def _atom(self) -> tuple[bool, _Node]:
        """The next atom, and whether it matches nothing but a position."""
        if self._bounds() is not None:
            raise PatternError(f"pattern {self._source!r}: a repetition of nothing")
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return False, self._char_class()
        if char in "^$":
            return True, _Where(_at_start if char == "^" else _at_end)
        if char == ".":
            return False, _Chars(lambda c: c != "\n")
        if char == "\\":
            kind = self._next()
            if kind in _CONDITIONS:
                return True, _Where(_CONDITIONS[kind])
            return False, _Chars(self._escaped(kind))
        return False, _Chars(char.__eq__)

    def _group(self) -> tuple[bool, _Node]:
        ahead: bool | None = None
        if self._take("?="):
            ahead = False
        elif self._take("?!"):
            ahead = True
        elif self._take("?P<"):
            end = self._source.find(">", self._at)
            if not self._source[self._at : max(end, self._at)].isidentifier():
                raise PatternError(f"pattern {self._source!r}: a group's name is malformed")
            self._at = end + 1
        elif self._peek() == "?" and not self._take("?:"):
            raise PatternError(f"pattern {self._source!r} uses (?{self._source[self._at + 1 : self._at + 3]}...)")
        node = self._branch()
        if not self._take(")"):
            raise PatternError(f"pattern {self._source!r}: a group is not closed")
        return (False, node) if ahead is None else (True, _Ahead(node, ahead))

    def _escaped(self, char: str) -> Callable[[str], bool]:
        if char in _CLASSES:
            return _CLASSES[char]
        if not char.isascii() or char.isalnum():
            raise PatternError(f"pattern {self._source!r} uses \\{char}")
        return char.__eq__

    def _char_class(self) -> _Node:
        negative = self._take("^")
        tests: list[Callable[[str], bool]] = []
        while not (tests and self._peek() == "]"):
            tests.append(self._class_item())
        self._at += 1
        return _Chars(lambda c: any(test(c) for test in tests) is not negative)

    def _class_item(self) -> Callable[[str], bool]:
        low, test = self._class_char()
        if self._peek() != "-" or self._peek(2) == "-]":
            return test
        self._at += 1
        high, _ = self._class_char()
        if low is None or high is None or high < low:
            raise PatternError(f"pattern {self._source!r}: a bad range in a character class")
        return lambda c: low <= c <= high

    def _class_char(self) -> tuple[str | None, Callable[[str], bool]]:
        """One character of a class, None for ``\\d`` and its like, with its test."""
        char = self._next()
        if char != "\\":
            return char, char.__eq__
        kind = self._next()
        return (None if kind in _CLASSES else kind), self._escaped(kind)
