"""Files of example prompts: a line each, or a JSON object a line. Knows no model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loraplex.errors import InvalidRequest, NotFound

_MAX_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt: a text, or (role, content) messages of a chat."""

    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def of(text: str, *, chat: bool) -> Example:
        """A text by itself, or as a user's message."""
        return Example(messages=(("user", text),)) if chat else Example(text)


def read_examples(path: Path, *, chat: bool) -> list[Example]:
    """The prompts of a file. ``chat``: texts are users' messages. Empty lines are passed over.

    Raises:
        NotFound: it cannot be read.
        InvalidRequest: it is too large, no UTF-8, has no prompts, or a line of a .jsonl is none; names the line.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise NotFound(f"examples {path}: cannot be read: {error.strerror}") from error
    if len(raw) > _MAX_BYTES:
        raise InvalidRequest(f"examples {path}: larger than {_MAX_BYTES} bytes")
    try:
        lines = raw.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"examples {path}: not UTF-8: {error}") from error
    read = _of_json if path.suffix == ".jsonl" else _of_text
    found = [read(line, f"{path}:{number}", chat) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise InvalidRequest(f"examples {path}: there is no prompt in it")
    return found


def _of_text(line: str, where: str, chat: bool) -> Example:
    return Example.of(line, chat=chat)


def _of_json(line: str, where: str, chat: bool) -> Example:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"examples {where}: not JSON: {error}") from error
    if not isinstance(value, dict) or ("text" in value) == ("messages" in value):
        raise InvalidRequest(f'examples {where}: expected an object with either "text" or "messages"')
    text, messages = value.get("text", ""), value.get("messages", [])
    if "text" in value:
        if not isinstance(text, str) or not text:
            raise InvalidRequest(f"examples {where}: text must be a string that is not empty")
        return Example.of(text, chat=chat)
    return Example(messages=tuple(_message(each, where) for each in _list(messages, where)))


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"examples {where}: messages must be a list that is not empty")
    return value


def _message(value: object, where: str) -> tuple[str, str]:
    if isinstance(value, dict):
        role, content = value.get("role"), value.get("content")
        if isinstance(role, str) and isinstance(content, str):
            return role, content
    raise InvalidRequest(f'examples {where}: a message has a "role" and a "content", both strings')
