"""What the adapters of one request come to, together: which versions, from where on, which tokens, what ends it.

The one place where a request meets the versions it will run with, and where a combination that has no meaning is
refused. Knows no tensors and no slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from loraplex.adapters.registry import AdapterHandle
from loraplex.engine.invocation import last_place
from loraplex.errors import InvalidRequest, Unavailable
from loraplex.types import MAX_ADAPTERS_PER_REQUEST, STALE_TEXT, ModelInfo, OwnText, Request, ResolvedAdapter, Routing

#: when a request whose text was made for another version may be sent again: the next change is told by then
_RETRY_AFTER_S: Final = 0.05
#: names and sites that a message shows
_SHOWN: Final = 9

Knowing = Callable[[int], str]
"""The name of some loaded adapter that knows a token id; empty: none does."""


@dataclass(frozen=True, slots=True)
class Active:
    """An adapter that changes something of a request: its content and weight, and the position of the first token that
    it changes."""

    uid: str
    weight: float = 1.0
    start: int = 0


@dataclass(frozen=True, slots=True)
class Uses:
    """``resolved`` has one entry for each adapter of the request, ``active`` one for each of those that change
    anything: not one of weight 0, and not one that the prompt does not invoke.

    ``vocab_size``: tokens that may stand in the sequence: the base's, or those of the adapter that knows most.
    ``eos_token_ids``: what ends it, all below that. ``own_rows``: an active one has rows of its own. ``alone``: the
    content that is used alone, with weight 1 and from the first token on; empty: there is none. ``merged``: the merged
    form of that, which takes its place in steps that nobody else has rows in; empty: none is to.
    """

    resolved: tuple[ResolvedAdapter, ...] = ()
    active: tuple[Active, ...] = ()
    vocab_size: int = 0
    eos_token_ids: tuple[int, ...] = ()
    own_rows: bool = False
    alone: str = ""
    merged: str = ""
    #: what the router made of it that chose the adapter; None: the request names its adapters
    routing: Routing | None = None


def check_names(request: Request) -> None:
    """Raises InvalidRequest: too many adapters, or one named twice."""
    names = [ref.name for ref in request.adapters]
    if len(set(names)) < len(names) or len(names) > MAX_ADAPTERS_PER_REQUEST:
        raise InvalidRequest(
            f"request '{request.request_id}' names {len(names)} adapters ({', '.join(names[:_SHOWN])}); "
            f"allowed are {MAX_ADAPTERS_PER_REQUEST}, each once",
            field="adapters",
        )


def uses_of(request: Request, handles: Sequence[AdapterHandle], model: ModelInfo, knowing: Knowing) -> Uses:
    """What the versions ``handles``, one for each adapter of the request, come to.

    ``knowing`` is asked for a refusal's words only.

    Raises:
        InvalidRequest: a sum that is not defined, or a token id that none of them knows.
        Unavailable: its text was made for other versions than these; made again, it may be right.
    """
    check_names(request)
    _check_sum(request, handles)
    text = _text_of(request, handles)
    vocab_size = max(model.vocab_size, _added_vocabulary(request, handles))
    check_token_ids(request, request.prompt_token_ids, vocab_size, knowing, "prompt")
    check_token_ids(request, request.stop.stop_token_ids, vocab_size, knowing, "stop.stop_token_ids")
    own = None if text is None else text.eos_token_ids
    eos = model.eos_token_ids if own is None else own
    starts = [_start(request, handle) for handle in handles]
    resolved = tuple(
        ResolvedAdapter(ref.name, handle.uid, ref.weight, invoked=start is not None)
        for handle, ref, start in zip(handles, request.adapters, starts, strict=True)
    )
    active = tuple(
        Active(adapter.uid, adapter.weight, start)
        for adapter, start in zip(resolved, starts, strict=True)
        # one of weight 0 adds nothing, not even what its rows would overflow to
        if start is not None and adapter.weight
    )
    uids = {one.uid for one in active}
    return Uses(
        resolved=resolved,
        active=active,
        vocab_size=vocab_size,
        # one past the vocabulary is never drawn, and has no logit that min_tokens could forbid
        eos_token_ids=tuple(token for token in eos if token < vocab_size),
        own_rows=any(handle.facts.own_rows for handle in handles if handle.uid in uids),
        alone=active[0].uid if [(one.weight, one.start) for one in active] == [(1.0, 0)] else "",
    )


def _start(request: Request, handle: AdapterHandle) -> int | None:
    """The position from which an adapter is on; None: the prompt does not invoke it."""
    invocation = handle.facts.invocation_tokens
    return last_place(request.prompt_token_ids, invocation) if invocation else 0


def _check_sum(request: Request, handles: Sequence[AdapterHandle]) -> None:
    """Raises InvalidRequest: a change that is no term of a sum is weighted, or meets another of its sort."""
    for handle, ref in zip(handles, request.adapters, strict=True):
        if handle.facts.exclusive and ref.weight != 1:
            raise _refusal(
                request, f"adapter {ref.name!r} has weight {ref.weight:g}, allowed is 1: it has {_why(handle, handle)}"
            )
    for index, one in enumerate(handles):
        for other in handles[index + 1 :]:
            if one.facts.exclusive.keys() & other.facts.exclusive.keys():
                raise _refusal(
                    request, f"adapters {one.name!r} and {other.name!r} have no sum: both have {_why(one, other)}"
                )


def _why(one: AdapterHandle, other: AdapterHandle) -> str:
    """Why the sites that two adapters (or one, with itself) change exclusively are no terms, and which they are."""
    sites: dict[str, list[str]] = {}
    for site, reason in one.facts.exclusive.items():
        if site in other.facts.exclusive:
            sites.setdefault(reason, []).append(site)
    return ", and ".join(f"{reason}, at {_some(names)}" for reason, names in sites.items())


def _some(sites: Sequence[str]) -> str:
    first, *more = sites
    return f"{first} and {len(more)} more" if more else first


def _added_vocabulary(request: Request, handles: Sequence[AdapterHandle]) -> int:
    """Tokens known where an adapter adds some, else 0. Raises InvalidRequest: two add different ones."""
    adding = [handle for handle in handles if handle.facts.vocab_size]
    sizes = {handle.facts.vocab_size for handle in adding}
    if len(sizes) > 1:
        known = ", ".join(f"{handle.name!r} knows {handle.facts.vocab_size} tokens" for handle in adding[:_SHOWN])
        raise _refusal(request, f"adapters with different added vocabularies have no sum: {known}")
    return max(sizes, default=0)


def _text_of(request: Request, handles: Sequence[AdapterHandle]) -> OwnText | None:
    """The adapters' own text files; None: the base's.

    Raises:
        InvalidRequest: two of them ship different ones.
        Unavailable: the request was made with others.
    """
    shipping = [(handle.name, handle.facts.text) for handle in handles if handle.facts.text is not None]
    digests = {text.digest for _, text in shipping}
    if len(digests) > 1:
        names = ", ".join(repr(name) for name, _ in shipping[:_SHOWN])
        raise _refusal(request, f"adapters {names} ship different tokenizers or generation settings: ask for one")
    if request.text_digest != "".join(digests):
        raise Unavailable(
            f"request '{request.request_id}': its text was made for another version of its adapters (text "
            f"{request.text_digest or 'of the base'}, theirs is {''.join(digests) or 'that of the base'}); ask again",
            field=STALE_TEXT,
            retry_after_s=_RETRY_AFTER_S,
        )
    return shipping[0][1] if shipping else None


def check_token_ids(request: Request, token_ids: Sequence[int], vocab_size: int, knowing: Knowing, field: str) -> None:
    """Raises InvalidRequest: one is outside the vocabulary."""
    if max(token_ids, default=0) < vocab_size and min(token_ids, default=0) >= 0:
        return
    strange = next(token for token in token_ids if not 0 <= token < vocab_size)
    name = knowing(strange)
    hint = f"; adapter {name!r}, which this request does not use, knows it" if name else ""
    raise InvalidRequest(
        f"request '{request.request_id}': {field}: token id {strange} is outside the vocabulary; "
        f"allowed are 0 to {vocab_size - 1}{hint}",
        field=field,
    )


def _refusal(request: Request, problem: str) -> InvalidRequest:
    return InvalidRequest(f"request '{request.request_id}': {problem}", field="adapters")
