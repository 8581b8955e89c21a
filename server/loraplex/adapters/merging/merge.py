"""Several lowered adapters -> one, site by site. Reads the algebra alone; runs in a loader's thread.

Sites are walked in the model's order and inputs in theirs, as PEFT does, so that the same seed keeps the same values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.coverage import coverage_of
from loraplex.adapters.delta import AdapterDelta, LowRank, SiteDelta
from loraplex.adapters.load import UID_HEX_DIGITS
from loraplex.adapters.merging.combination import Combination
from loraplex.adapters.merging.dense_sum import clamped, merge_dense, truncation
from loraplex.adapters.merging.factor_wise import merge_factors
from loraplex.adapters.merging.low_rank_sum import LowRankSum
from loraplex.adapters.merging.methods import Form
from loraplex.adapters.merging.options import check_options, refusal
from loraplex.adapters.merging.part import Part
from loraplex.adapters.merging.sums import Input, SiteSum, added_vocabulary, shared_text, sums_of
from loraplex.adapters.merging.truncation import Truncation, kept, kept_within
from loraplex.adapters.telling import telling_tokens
from loraplex.models.sites import Site
from loraplex.types import MergeOptions


@dataclass(frozen=True, slots=True)
class Merged:
    """``errors``: site -> relative Frobenius error of a change that was compressed, against the uncompressed one, its
    rounding to the base's dtype counted in; sites that were not are left out."""

    delta: AdapterDelta
    errors: Mapping[str, float]


OnSite = Callable[[SiteDelta], None]
"""Given each site's merged change when it is there. What it raises ends the merge."""


def merge(
    inputs: Sequence[Input], options: MergeOptions, base: BaseView, on_site: OnSite = lambda delta: None
) -> Merged:
    """One adapter of several (delta, weight), which stay as they are; of kind ``merge:<method>``, factors in the base's
    dtype on the host, from products in float32. An adapter may be there more than once.

    Raises:
        InvalidRequest: a wrong option or weight, inputs that the method cannot merge (field of ``MergeOptions``, or
            ``inputs``), or a result that changes nothing.
        UnsupportedFeature: changes that have no sum; names input, site and reason.
    """
    method = check_options(options)
    combination = Combination(
        method, options.density, options.majority_sign_method, torch.Generator().manual_seed(options.seed)
    )
    sums = sums_of(inputs, base, plain=combination.is_sum)
    vocab_size, text = added_vocabulary(inputs), shared_text(inputs)
    _check_ranks(sums, options, method.form)
    merger = _Merger(_FORMS[method.form], options, combination, base, max(delta.max_rank for delta, _ in inputs))
    sites: dict[str, SiteDelta] = {}
    for found in sums:
        sites[found.site.name] = found.kept or merger.site(found)
        on_site(sites[found.site.name])
    identity = all(delta.identity for delta, _ in inputs)
    if not identity and not any(_changes(delta) for delta in sites.values()):
        raise refusal(
            "inputs", "come to nothing: at every site their weighted changes, as the method merges them, are 0"
        )
    return Merged(
        AdapterDelta(
            uid=_uid(inputs, options),
            kind=f"merge:{options.method}",
            sites=sites,
            coverage=coverage_of(sites, base.by_name()),
            vocab_size=vocab_size,
            identity=identity,
            telling_tokens=telling_tokens(sites, base.sites),
            text=text,
            template_unused=any(delta.template_unused for delta, _ in inputs),
        ),
        merger.errors,
    )


@dataclass(frozen=True, slots=True)
class _Merger:
    """Merges sites of one merge. ``max_rank``: the largest of the inputs; ``errors`` are gathered on the way."""

    low_rank: Callable[[_Merger, Site, Sequence[Part]], LowRank]
    options: MergeOptions
    combination: Combination
    base: BaseView
    max_rank: int
    errors: dict[str, float] = field(default_factory=dict)

    def site(self, found: SiteSum) -> SiteDelta:
        """Low-rank changes and shifts of a site, or scales, merged."""
        if (scale := found.scale) is not None:
            for vector in scale.tensors:
                self.checked(found.site, vector)
            return scale
        low_rank = self.low_rank(self, found.site, parts) if (parts := found.parts) else None
        shifts, weights = found.shifts
        shift = self.checked(found.site, self.combination.of(shifts, weights)) if shifts else None
        return SiteDelta(low_rank, shift=shift)

    def checked(self, site: Site, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``. Raises InvalidRequest: weights took its values out of the range of its dtype."""
        # a norm in float64 is finite where all values are, and is found far faster than isfinite looks
        if not bool(torch.linalg.vector_norm(tensor, dtype=torch.float64).isfinite()):
            raise refusal("inputs", f"have weights with which {site.name!r} leaves the range of {tensor.dtype}")
        return tensor

    def rounded(self, site: Site, a: torch.Tensor, b: torch.Tensor) -> LowRank:
        """A and B in the base's dtype. Raises InvalidRequest: their values leave its range."""
        a, b = (self.checked(site, factor.to(self.base.dtype).contiguous()) for factor in (a, b))
        return LowRank(a, b, 1.0)

    def low_rank_sum(self, site: Site, parts: Sequence[Part]) -> LowRankSum:
        """Of finite factors. Raises InvalidRequest."""
        total = LowRankSum.of(parts)
        self.checked(site, total.b)
        return total

    def dense_sum(self, site: Site, parts: Sequence[Part]) -> torch.Tensor:
        """The merged dense change, finite. Raises InvalidRequest."""
        return self.checked(site, merge_dense(site, parts, self.combination))

    def truncated(self, site: Site, found: Truncation, rank: int) -> LowRank:
        """Of the rank that is asked for, or of the least one within the error that is."""

        def rounding(a: torch.Tensor, b: torch.Tensor) -> LowRank:
            return self.rounded(site, a, b)

        if self.options.max_error:
            low_rank, error = kept_within(found, self.options.max_error, rounding, site.name)
        else:
            low_rank, error = kept(found, rank, rounding)
        self.errors[site.name] = error
        return low_rank


def _factor_wise(merger: _Merger, site: Site, parts: Sequence[Part]) -> LowRank:
    return merger.rounded(site, *merge_factors(parts, merger.combination))


def _cat(merger: _Merger, site: Site, parts: Sequence[Part]) -> LowRank:
    """The exact sum, compressed where a rank or an error is asked for, or where its rank is more than the site's."""
    total, rank = merger.low_rank_sum(site, parts), merger.options.svd_rank or _size(site)
    if merger.options.max_error or rank < total.rank:
        return merger.truncated(site, total.truncation(), rank)
    return merger.rounded(site, total.a, total.b)


def _svd(merger: _Merger, site: Site, parts: Sequence[Part]) -> LowRank:
    """The largest singular components of the merged dense change; of a plain sum without forming it."""
    options, rank = merger.options, min(merger.options.svd_rank or merger.max_rank, _size(site))
    if options.svd_clamp:
        a, b, distance = clamped(merger.dense_sum(site, parts), rank, options.svd_clamp, site.name)
        low_rank = merger.rounded(site, a, b)
        merger.errors[site.name] = distance(low_rank)
        return low_rank
    if merger.combination.is_sum:
        return merger.truncated(site, merger.low_rank_sum(site, parts).truncation(), rank)
    asked = None if options.max_error else rank
    return merger.truncated(site, truncation(merger.dense_sum(site, parts), asked), rank)


_FORMS: Final = {Form.FACTOR_WISE: _factor_wise, Form.CAT: _cat, Form.SVD: _svd}


def _check_ranks(sums: Sequence[SiteSum], options: MergeOptions, form: Form) -> None:
    """Raises InvalidRequest: inputs of different ranks that the method cannot merge, or a rank that no matrix of a site
    has."""
    for found in sums:
        ranks = {part.low_rank.rank for part in found.parts}
        if form is Form.FACTOR_WISE and len(ranks) > 1:
            raise refusal(
                "method",
                f"{options.method!r} merges factors of equal ranks; at {found.site.name!r} the inputs have "
                f"{', '.join(map(str, sorted(ranks)))} (cat and the svd methods take them)",
            )
        if ranks and options.svd_rank > _size(found.site):
            raise refusal(
                "svd_rank",
                f"{options.svd_rank} is more than {found.site.name!r} has, which is {found.site.out_features} x "
                f"{found.site.in_features}; allowed is up to {_size(found.site)}",
            )


def _size(site: Site) -> int:
    """The highest rank that a matrix of the site has."""
    return min(site.out_features, site.in_features)


def _changes(delta: SiteDelta) -> bool:
    low_rank = delta.low_rank
    if low_rank is None:
        return delta.shift is None or bool(delta.shift.any())
    return (bool(low_rank.a.any()) and bool(low_rank.b.any())) or (delta.shift is not None and bool(delta.shift.any()))


def _uid(inputs: Sequence[Input], options: MergeOptions) -> str:
    """Of what the inputs are, their weights and the options."""
    content = msgspec.json.encode(([(delta.uid, float(weight)) for delta, weight in inputs], options))
    return hashlib.sha256(b"merge:" + content).hexdigest()[:UID_HEX_DIGITS]
