"""Which adapters merge: what of their changes is a term of a sum, at each site, and what is not and is kept or refused.

A low-rank change and a shift merge. What has rows of its own or scales a layer's outputs or inputs (saved modules,
trained tokens, DoRA) says something of a layer as it is: it stays as it is where its adapter has weight 1 and no other
input touches the site, as in a request's sum. Scales alone (IA3) have a sum of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta, SiteDelta
from loraplex.adapters.merging.options import refusal
from loraplex.adapters.merging.part import Part
from loraplex.errors import UnsupportedFeature
from loraplex.models.sites import Site
from loraplex.text.pack import AdapterText
from loraplex.types import MAX_MERGE_INPUTS

Input = tuple[AdapterDelta, float]
"""An adapter and its weight."""


@dataclass(frozen=True, slots=True)
class Term:
    """What one input does to a site. ``who`` names it, for people."""

    delta: SiteDelta
    weight: float
    who: str

    @property
    def is_scale(self) -> bool:
        """Whether it scales the outputs, or the inputs, and does nothing else."""
        one = (self.delta.out_scale is None) is not (self.delta.in_scale is None)
        return one and self.delta.change() in ("out scale", "in scale") and not self.delta.exclusive

    @property
    def merges(self) -> bool:
        """Whether it is a low-rank change and a shift, or one of the two."""
        whole = (self.delta.rows, self.delta.out_scale, self.delta.in_scale)
        return all(part is None for part in whole) and not self.delta.exclusive

    def why_not(self) -> str:
        """Why it is no term of a sum."""
        return self.delta.exclusive or f"a change that is no plain sum ({self.delta.change()})"


@dataclass(frozen=True, slots=True)
class SiteSum:
    """The inputs that touch a site. ``kept``: the change as it is, of the only one; ``scale``: the sum of scales."""

    site: Site
    terms: tuple[Term, ...]

    @property
    def kept(self) -> SiteDelta | None:
        only = self.terms[0]
        return only.delta if len(self.terms) == 1 and only.weight == 1 and not only.merges else None

    @property
    def parts(self) -> list[Part]:
        """The low-rank changes."""
        return [Part(term.delta.low_rank, term.weight) for term in self.terms if term.delta.low_rank is not None]

    @property
    def shifts(self) -> tuple[list[torch.Tensor], list[float]]:
        """The shifts, and the weights of the inputs that have them."""
        shifting = [(term.delta.shift, term.weight) for term in self.terms if term.delta.shift is not None]
        return [shift for shift, _ in shifting], [weight for _, weight in shifting]

    @property
    def scale(self) -> SiteDelta | None:
        """``1 + sum_i w_i (scale_i - 1)``, where all that touches the site scales its outputs, or its inputs."""
        changes = {term.delta.change() for term in self.terms}
        if len(changes) > 1 or not all(term.is_scale for term in self.terms):
            return None
        of_outputs = changes == {"out scale"}
        vectors = [term.delta.out_scale if of_outputs else term.delta.in_scale for term in self.terms]
        total = torch.stack(
            [term.weight * (v - 1) for v, term in zip(vectors, self.terms, strict=True) if v is not None]
        ).sum(0)
        return SiteDelta(out_scale=1 + total) if of_outputs else SiteDelta(in_scale=1 + total)


def sums_of(inputs: Sequence[Input], base: BaseView, *, plain: bool) -> list[SiteSum]:
    """Of every site that is touched the inputs that do, in site order. ``plain``: scales may be added.

    Raises:
        InvalidRequest: no inputs, too many, or a weight that is no number.
        UnsupportedFeature: what they change has no sum; names input, site and reason.
    """
    _check(inputs)
    found: list[SiteSum] = []
    for site in base.sites:
        terms = tuple(
            Term(delta.sites[site.name], weight, _named(index, delta))
            for index, (delta, weight) in enumerate(inputs)
            if site.name in delta.sites
        )
        if terms:
            found.append(SiteSum(site, terms))
            _check_terms(found[-1], plain)
    return found


def added_vocabulary(inputs: Sequence[Input]) -> int:
    """Tokens known where an input adds some, else 0. Raises UnsupportedFeature: two add different ones."""
    known = {_named(index, delta): delta.vocab_size for index, (delta, _) in enumerate(inputs) if delta.vocab_size}
    if len(set(known.values())) > 1:
        told = ", ".join(f"{who} knows {size} tokens" for who, size in known.items())
        raise _unsupported(f"adapters with different added vocabularies have no merge: {told}")
    return max(known.values(), default=0)


def shared_text(inputs: Sequence[Input]) -> AdapterText | None:
    """The text files that the inputs ship; None: none does. Raises UnsupportedFeature: two ship different ones."""
    shipped = {_named(index, delta): delta.text for index, (delta, _) in enumerate(inputs) if delta.text is not None}
    if len({text.facts.digest for text in shipped.values()}) > 1:
        raise _unsupported(
            f"{', '.join(shipped)} ship different tokenizers, templates or generation settings: the result would have "
            "none that is right for all of them"
        )
    return next(iter(shipped.values()), None)


def _check(inputs: Sequence[Input]) -> None:
    if not inputs:
        raise refusal("inputs", "is empty; a merge takes one adapter or more")
    if len(inputs) > MAX_MERGE_INPUTS:
        raise refusal("inputs", f"are {len(inputs)}; allowed are {MAX_MERGE_INPUTS}")
    for index, (delta, weight) in enumerate(inputs):
        who = _named(index, delta)
        if not math.isfinite(weight):
            raise refusal("inputs", f"has a weight of {weight} for {who}; allowed are finite numbers")
        if delta.invocation_tokens:
            raise _unsupported(
                f"{who} is an activated LoRA, which changes nothing before its invocation tokens; merged it would"
            )
    if all(weight == 0 for _, weight in inputs):
        raise refusal("inputs", "all have weight 0: the result would change nothing")


def _check_terms(found: SiteSum, plain: bool) -> None:
    if all(term.merges for term in found.terms) or found.kept is not None or (plain and found.scale is not None):
        return
    odd = next(term for term in found.terms if not term.merges)
    others = [term.who for term in found.terms if term is not odd]
    touched = f"and {others[0]} touches that site too" if others else f"with weight {odd.weight:g}"
    raise _unsupported(
        f"{odd.who} has {odd.why_not()}, at {found.site.name!r}, {touched}; such a change is kept as it is where its "
        "input has weight 1 and no other touches the site"
    )


def _named(index: int, delta: AdapterDelta) -> str:
    return f"input {index + 1} (a {delta.kind})"


def _unsupported(what: str) -> UnsupportedFeature:
    return UnsupportedFeature(f"merge: {what}", field="inputs")
