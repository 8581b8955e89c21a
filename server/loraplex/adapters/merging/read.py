"""From a recipe to the merged adapter: its inputs are read again, and must be as they were. For a loader thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta, SiteDelta
from loraplex.adapters.merging.merge import merge
from loraplex.adapters.merging.recipe import decode, is_recipe
from loraplex.adapters.merging.team import Team
from loraplex.errors import LoraplexError, Mismatch, OverCapacity
from loraplex.types import MergeInput, MergeRecipe, MergeReport


@dataclass(frozen=True, slots=True)
class MergeMeans:
    """``read`` lowers the adapter of a source that is no recipe. ``max_bytes``: what the inputs of one merge may take
    together, and its result. ``give_way`` is called between pieces of work, at which ``team`` works."""

    read: Callable[[str], AdapterDelta]
    base: BaseView
    max_bytes: int
    give_way: Callable[[], None]
    team: Team


def read_merged(source: str, means: MergeMeans) -> tuple[AdapterDelta, MergeReport]:
    """The merged adapter that ``source``, the text form of a recipe, stands for.

    Raises:
        InvalidRequest: the text is no recipe.
        Mismatch: an input is no longer what it was when the recipe was made.
        OverCapacity: too large.
        UnsupportedFeature: inputs that have no such sum; and whatever reading an input does, naming it.
    """
    return _merged(decode(source), means)


def _merged(recipe: MergeRecipe, means: MergeMeans) -> tuple[AdapterDelta, MergeReport]:
    deltas: list[AdapterDelta] = []
    for each in recipe.inputs:
        means.give_way()
        deltas.append(_input(each, means))
        _check_size("its inputs take", sum(delta.nbytes for delta in deltas), means)
    inputs = [(delta, each.weight) for delta, each in zip(deltas, recipe.inputs, strict=True)]
    size = 0

    def on_site(delta: SiteDelta) -> None:
        nonlocal size
        size += delta.nbytes
        _check_size("its result takes", size, means)
        means.give_way()

    merged = merge(inputs, recipe.options, means.base, on_site, means.team)
    errors = list(merged.errors.values())
    report = MergeReport(recipe, max(errors, default=0.0), sum(errors) / max(len(errors), 1))
    return merged.delta, report


def _input(each: MergeInput, means: MergeMeans) -> AdapterDelta:
    try:
        delta = _merged(decode(each.source), means)[0] if is_recipe(each.source) else means.read(each.source)
    except LoraplexError as error:
        raise type(error)(f"merge: input {each.name!r}: {error}", field="inputs") from error
    if delta.uid != each.uid:
        raise Mismatch(
            f"merge: input {each.name!r}: what is read from {each.source!r} has uid {delta.uid}, and {each.uid!r} was "
            "to be merged: its files have changed since it was loaded; load it again, and merge that",
            field="inputs",
        )
    return delta


def _check_size(what: str, nbytes: int, means: MergeMeans) -> None:
    if nbytes > means.max_bytes:
        raise OverCapacity(f"merge: {what} {nbytes} bytes; at most {means.max_bytes} are allowed (max_adapter_bytes)")
