"""What is to be merged: names as they stand now become a recipe, which needs none of them any more."""

from __future__ import annotations

from loraplex.adapters.registry import AdapterRegistry
from loraplex.engine.messages import MergeAdapters
from loraplex.errors import InvalidRequest, Mismatch, NotFound
from loraplex.types import MergeInput, MergeRecipe


def recipe_of(message: MergeAdapters, registry: AdapterRegistry) -> MergeRecipe:
    """The recipe of a merge of the versions that are READY under the inputs' names.

    Raises:
        InvalidRequest: an input is named twice, or is a router.
        NotFound: one is not loaded; names the nearest.
        Mismatch: one is being loaded for the first time.
    """
    names = [ref.name for ref in message.inputs]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest(
                f"merge: inputs name {name!r} {names.count(name)} times; name it once, with the sum of its weights",
                field="inputs",
            )
    inputs = []
    for ref in message.inputs:
        source, uid = _ready(ref.name, registry)
        inputs.append(MergeInput(ref.name, source, uid, ref.weight))
    return MergeRecipe(tuple(inputs), message.options)


def _ready(name: str, registry: AdapterRegistry) -> tuple[str, str]:
    """(source, uid) of the READY version."""
    try:
        handle = registry.ready(name)
    except NotFound as error:
        if registry.loads(name):
            raise Mismatch(
                f"merge: input {name!r} is being loaded; merge it when the load has ended", field="inputs"
            ) from None
        raise NotFound(f"merge: {error}", field="inputs") from None
    if handle.facts.chooser is not None:
        raise InvalidRequest(f"merge: input {name!r} is a router, which has nothing to merge", field="inputs")
    return handle.source, handle.uid
