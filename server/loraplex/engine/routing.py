"""Requests that leave the choice of their adapter to a router: ``auto:ROUTER`` becomes the adapter it chooses.

A choice takes no time to speak of, so nothing is held of a router: it may be unloaded while requests run that it chose
for. Knows no tensors; owned by the adapter desk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from loraplex.adapters.registry import AdapterHandle, AdapterRegistry
from loraplex.engine.uses import check_token_ids
from loraplex.errors import InvalidRequest, Mismatch, NotFound
from loraplex.types import ROUTER_PREFIX, AdapterRef, Request, Routing


@dataclass(frozen=True, slots=True)
class Routed:
    """A request whose adapters are names of versions. ``routing``: what a router made of it; None: it names them
    itself."""

    request: Request
    routing: Routing | None = None


def routed(request: Request, registry: AdapterRegistry, vocab_size: int) -> Routed | None:
    """``request`` with the adapter that its router chooses, if it asks for one. None: the router is still loading for
    the first time; ask again later.

    Raises:
        InvalidRequest: the router stands among several adapters, or is none; or a prompt's token id is outside the
            base's vocabulary of ``vocab_size``.
        NotFound: there is no such router, or the chosen adapter is not loaded; no other is taken for it.
        Mismatch: the chosen adapter cannot be served on a prompt that was made for the base.
    """
    ref = next((ref for ref in request.adapters if ref.name.startswith(ROUTER_PREFIX)), None)
    if ref is None:
        return Routed(request)
    if len(request.adapters) > 1:
        raise _refusal(
            request, f"{ref.name!r} stands among {len(request.adapters)} adapters; a router chooses one: name it alone"
        )
    router = registry.acquire(ref.name.removeprefix(ROUTER_PREFIX))
    if router is None:
        return None
    registry.release(router)
    chooser = router.facts.chooser
    if chooser is None:
        raise _refusal(request, f"{router.name!r} is no router but an adapter; name it without {ROUTER_PREFIX!r}")
    check_token_ids(request, request.prompt_token_ids, vocab_size, registry.knowing, "prompt")
    chosen, candidates = chooser.choose(request.prompt_token_ids)
    routing = Routing(router.name, router.uid, chosen, candidates)
    if not chosen:
        return Routed(msgspec.structs.replace(request, adapters=()), routing)
    _check_chosen(request, router.name, chosen, registry)
    return Routed(msgspec.structs.replace(request, adapters=(AdapterRef(chosen, ref.weight),)), routing)


def check_no_router(request: Request, handles: Sequence[AdapterHandle]) -> None:
    """Raises InvalidRequest: a router is named as if it were an adapter."""
    for handle in handles:
        if handle.facts.chooser is not None:
            raise _refusal(
                request,
                f"{handle.name!r} is a router, not an adapter; '{ROUTER_PREFIX}{handle.name}' has it choose one",
            )


def check_has_weights(handle: AdapterHandle, verb: str, field: str) -> None:
    """Raises InvalidRequest: a router is named where an adapter is to be merged or exported."""
    if handle.facts.chooser is not None:
        raise InvalidRequest(
            f"{handle.name!r} is a router, which has nothing to {verb}; name one of the adapters it chooses among",
            field=field,
        )


def _check_chosen(request: Request, router: str, chosen: str, registry: AdapterRegistry) -> None:
    """One that is loading for the first time is waited for."""
    what = f"request '{request.request_id}': router {router!r} chose {chosen!r}"
    try:
        facts = registry.ready(chosen).facts
    except NotFound as error:
        if registry.loads(chosen):
            return
        raise NotFound(f"{what}: {error}", field="adapters") from None
    if facts.chooser is not None:
        raise Mismatch(f"{what}, which is a router itself; a router chooses among adapters alone", field="adapters")
    if facts.text is not None:
        raise Mismatch(
            f"{what}, which ships a tokenizer, chat template or generation settings of its own: the prompt was made "
            "with those of the base; name the adapter itself",
            field="adapters",
        )


def _refusal(request: Request, problem: str) -> InvalidRequest:
    return InvalidRequest(f"request '{request.request_id}': {problem}", field="adapters")
