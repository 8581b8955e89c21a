"""What a stranger's tokenizer.json may make a server do: text must not grow without bound, tokens stay short.

Tokenizers run on every prompt in the process that speaks to clients, so that a file which turns a kilobyte into a
gigabyte is refused when it is loaded. Regular expressions are bounded by their engine, which gives up on a match.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from loraplex.errors import InvalidAdapter, UnsupportedFeature

#: characters of one token
MAX_TOKEN_CHARS: Final = 4096
MAX_ADDED_TOKENS: Final = 100_000
#: how much longer all replacements together may make a text
_MAX_GROWTH: Final = 64
_MAX_DEPTH: Final = 16
_MAX_COMPONENTS: Final = 64
#: characters that a component may put before or after a text
_MAX_CONSTANT: Final = 256

Component = Mapping[str, object]


def check_document(head: Mapping[str, object], base: Mapping[str, object], where: str) -> None:
    """Refuse a tokenizer that could swamp the server. ``head`` is its document without the model, ``base`` the base's.

    Raises:
        InvalidAdapter: tokens too long or too many, components nested too deeply or growing text too much.
        UnsupportedFeature: a normalizer that only its own table bounds, and that is not the base's.
    """
    _check_tokens(head.get("added_tokens"), where)
    for part in ("normalizer", "decoder"):
        if head.get(part) == base.get(part):
            continue
        components = list(_components(head.get(part), where, depth=0))
        if len(components) > _MAX_COMPONENTS:
            raise InvalidAdapter(f"{where}: {part} has {len(components)} components; allowed are {_MAX_COMPONENTS}")
        growth = 1.0
        for component in components:
            growth *= _growth(component, part, where)
        if growth > _MAX_GROWTH:
            raise InvalidAdapter(f"{where}: {part} makes text up to {growth:g} times longer; allowed is {_MAX_GROWTH}")


def _check_tokens(tokens: object, where: str) -> None:
    if not isinstance(tokens, list):
        raise InvalidAdapter(f"{where}: added_tokens is no list")
    if len(tokens) > MAX_ADDED_TOKENS:
        raise InvalidAdapter(f"{where}: {len(tokens)} added tokens; allowed are {MAX_ADDED_TOKENS}")
    for token in tokens:
        content = token.get("content") if isinstance(token, dict) else None
        identity = token.get("id") if isinstance(token, dict) else None
        if type(content) is not str or type(identity) is not int or not 1 <= len(content) <= MAX_TOKEN_CHARS:
            raise InvalidAdapter(
                f"{where}: added token {str(token)[:80]}: expected an id and 1 to {MAX_TOKEN_CHARS} characters"
            )


def _components(part: object, where: str, *, depth: int) -> Iterator[Component]:
    """The part itself, and what it is a sequence of."""
    if depth > _MAX_DEPTH:
        raise InvalidAdapter(f"{where}: components are nested deeper than {_MAX_DEPTH}")
    if not isinstance(part, dict):
        return
    yield part
    for key in ("normalizers", "decoders"):
        inner = part.get(key)
        for item in inner if isinstance(inner, list) else ():
            yield from _components(item, where, depth=depth + 1)


def _growth(component: Component, part: str, where: str) -> float:
    """How many times longer a text one component can make."""
    kind = component.get("type")
    if kind == "Precompiled":
        raise UnsupportedFeature(f"{where}: a Precompiled {part} other than the base's is not served", field="type")
    if kind == "Prepend" and len(str(component.get("prepend"))) > _MAX_CONSTANT:
        raise InvalidAdapter(f"{where}: {part} Prepend of more than {_MAX_CONSTANT} characters")
    if kind != "Replace":
        return 1.0
    pattern = component.get("pattern")
    content = str(component.get("content"))
    if not isinstance(pattern, dict) or "String" not in pattern:
        if part == "decoder":
            raise UnsupportedFeature(f"{where}: a decoder with a regular expression is not served", field="decoder")
        return 1.0 + len(content)  # an expression may match between any two characters
    return max(1.0, len(content) / max(1, len(str(pattern["String"]))))
