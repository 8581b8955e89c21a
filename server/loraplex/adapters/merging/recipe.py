"""The text form of a merge's recipe, which is the merged adapter's source, and what a recipe may say. No torch.

The form is ``merge:`` and the recipe as JSON without blanks. An input's source may be such a text again.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from loraplex.adapters.merging.options import check_options, refusal
from loraplex.errors import InvalidRequest
from loraplex.types import MAX_MERGE_BYTES, MAX_MERGE_INPUTS, MERGE_PREFIX, MergeRecipe

#: merges among the inputs of merges
MAX_DEPTH: Final = 4

_decode: Final = msgspec.json.Decoder(MergeRecipe).decode


def is_recipe(source: str) -> bool:
    """Whether ``source`` names a merge, and no directory."""
    return source.startswith(MERGE_PREFIX)


def encode(recipe: MergeRecipe) -> str:
    """The text form of a recipe.

    Raises:
        InvalidRequest: it is none that may be made, or its text is too long.
    """
    text = MERGE_PREFIX + msgspec.json.encode(recipe).decode()
    _check_length(text)
    _check(recipe, depth=1)
    return text


def decode(text: str) -> MergeRecipe:
    """The recipe that ``text`` is the form of.

    Raises:
        InvalidRequest: it is too long or malformed, or a recipe that may not be made.
    """
    recipe = _parsed(text)
    _check(recipe, depth=1)
    return recipe


def shown(source: str) -> str:
    """A source in a message: a merge by what it is made of, anything else as it is."""
    if not is_recipe(source):
        return repr(source)
    try:
        recipe = decode(source)
    except InvalidRequest:
        return repr(source[:64])
    return f"a merge of {' and '.join(repr(each.name) for each in recipe.inputs)} ({recipe.options.method})"


def _parsed(text: str) -> MergeRecipe:
    _check_length(text)
    if not is_recipe(text):
        raise InvalidRequest(f"source {text[:64]!r} is no merge; it begins with {MERGE_PREFIX!r}", field="source")
    try:
        return _decode(text[len(MERGE_PREFIX) :].encode())
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise InvalidRequest(f"source {text[:64]!r}: {error}", field="source") from error


def _check_length(text: str) -> None:
    if len(text) > MAX_MERGE_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_MERGE_BYTES:
        raise InvalidRequest(
            f"source {text[:64]!r}...: the merge takes {len(text)} characters to tell, with those among its inputs; "
            f"allowed are {MAX_MERGE_BYTES} bytes",
            field="source",
        )


def _check(recipe: MergeRecipe, depth: int) -> int:
    """How many inputs there are, those of merges among them counted. Raises InvalidRequest."""
    check_options(recipe.options)
    if not recipe.inputs:
        raise refusal("inputs", "is empty; a merge takes one adapter or more")
    if depth > MAX_DEPTH:
        raise refusal("inputs", f"are merges of merges {depth} deep; allowed are {MAX_DEPTH}")
    count = 0
    for each in recipe.inputs:
        if not math.isfinite(each.weight):
            raise refusal("inputs", f"{each.name[:128]!r} has weight {each.weight}; allowed are finite numbers")
        count += _check(_parsed(each.source), depth + 1) if is_recipe(each.source) else 1
    if count > MAX_MERGE_INPUTS:
        raise refusal("inputs", f"are {count}, with those of merges among them; allowed are {MAX_MERGE_INPUTS}")
    return count
