"""The text form of a merge's recipe, which is the merged adapter's source, and what a recipe may say. No torch.

The form is ``merge:`` and the recipe as JSON without blanks. An input's source may be such a text again.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from loraplex.errors import InvalidRequest
from loraplex.types import MAX_MERGE_BYTES, MAX_MERGE_INPUTS, MERGE_PREFIX, MergeOptions, MergeRecipe

#: merges among the inputs of merges
MAX_DEPTH: Final = 4

TIES: Final = ("ties", "ties_svd", "dare_ties", "dare_ties_svd")
DARE: Final = ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd")
SVD: Final = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
PRUNED: Final = (*dict.fromkeys((*TIES, *DARE)), "magnitude_prune", "magnitude_prune_svd")
METHODS: Final = tuple(dict.fromkeys(("linear", "cat", *SVD, *PRUNED)))
MAJORITY_SIGN_METHODS: Final = ("total", "frequency")
#: option -> the methods that use it; for others it must be left at its default
_USED_BY: Final = {
    "density": PRUNED,
    "majority_sign_method": TIES,
    "svd_rank": ("cat", *SVD),
    "svd_clamp": SVD,
    "max_error": ("cat",),
    "seed": DARE,
}
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


def check_options(options: MergeOptions) -> None:
    """Raises InvalidRequest: an unknown method, an option outside its range or one that the method has no use for."""
    if options.method not in METHODS:
        raise _refusal("method", f"{options.method[:64]!r} is unknown; allowed are {', '.join(METHODS)}")
    if not 0 <= options.density <= 1:
        raise _refusal("density", f"{options.density} is outside its range; allowed is above 0 up to 1")
    if options.majority_sign_method not in MAJORITY_SIGN_METHODS:
        named = ", ".join(MAJORITY_SIGN_METHODS)
        raise _refusal("majority_sign_method", f"{options.majority_sign_method[:64]!r} is unknown; allowed are {named}")
    if not 0 <= options.svd_rank < 1 << 16:
        raise _refusal("svd_rank", f"{options.svd_rank} is outside its range; allowed is 0 to {(1 << 16) - 1}")
    for name, value in (("svd_clamp", options.svd_clamp), ("max_error", options.max_error)):
        if not 0 <= value <= 1:
            raise _refusal(name, f"{value} is outside its range; allowed is 0 to 1")
    if not 0 <= options.seed < 1 << 64:
        raise _refusal("seed", f"{options.seed} is outside its range; allowed is 0 to {(1 << 64) - 1}")
    defaults = MergeOptions(options.method)
    for name, methods in _USED_BY.items():
        value = getattr(options, name)
        if value != getattr(defaults, name) and options.method not in methods:
            raise _refusal(name, f"{value} has no use in method {options.method!r}; it is used by {', '.join(methods)}")


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
        raise _refusal("inputs", "is empty; a merge takes one adapter or more")
    if depth > MAX_DEPTH:
        raise _refusal("inputs", f"are merges of merges {depth} deep; allowed are {MAX_DEPTH}")
    count = 0
    for each in recipe.inputs:
        if not math.isfinite(each.weight):
            raise _refusal("inputs", f"{each.name[:128]!r} has weight {each.weight}; allowed are finite numbers")
        count += _check(_parsed(each.source), depth + 1) if is_recipe(each.source) else 1
    if count > MAX_MERGE_INPUTS:
        raise _refusal("inputs", f"are {count}, with those of merges among them; allowed are {MAX_MERGE_INPUTS}")
    return count


def _refusal(field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"merge: {field} {what}", field=field)
