"""Several lowered adapters -> one, site by site. Reads the algebra alone; runs in a loader's thread.

Sites are walked in the model's order and inputs in theirs, as PEFT does, so that the same seed keeps the same values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

import msgspec
import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.coverage import coverage_of
from loraplex.adapters.delta import AdapterDelta, LowRank, SiteDelta
from loraplex.adapters.merging.combination import Combination
from loraplex.adapters.merging.dense_sum import clamped, decompose, distance_from, merge_dense
from loraplex.adapters.merging.factor_wise import merge_factors
from loraplex.adapters.merging.left_vectors import left_vectors
from loraplex.adapters.merging.low_rank_sum import LowRankSum
from loraplex.adapters.merging.matrix import Matrix, whole
from loraplex.adapters.merging.methods import Form
from loraplex.adapters.merging.options import check_options, refusal
from loraplex.adapters.merging.part import Part
from loraplex.adapters.merging.room import dense_bytes, room_of
from loraplex.adapters.merging.sums import Input, SiteSum, added_vocabulary, shared_text, sums_of
from loraplex.adapters.merging.team import Task, Team
from loraplex.adapters.merging.truncation import Truncation, kept, kept_within
from loraplex.adapters.telling import telling_tokens
from loraplex.adapters.uid import UID_HEX_DIGITS
from loraplex.errors import InvalidRequest
from loraplex.models.sites import Site
from loraplex.types import MergeOptions
from loraplex_kernels.backend import AUTO, REFERENCE, choose_merging
from loraplex_kernels.merging import Operand

T = TypeVar("T")

#: elements of a result that are looked at together: in float64 they stay in a processor's cache
_PIECE: Final = 1 << 13


@dataclass(frozen=True, slots=True)
class Merged:
    """``errors``: site -> relative Frobenius error of a change that was compressed, against the uncompressed one, its
    rounding to the base's dtype counted in; sites that were not are left out."""

    delta: AdapterDelta
    errors: Mapping[str, float]


Rest = Callable[[], T]
"""Of what has been begun; that of two sites may be done at once."""
OnSite = Callable[[SiteDelta], None]
"""Given each site's merged change when it is there. What it raises ends the merge."""


def merge(
    inputs: Sequence[Input],
    options: MergeOptions,
    base: BaseView,
    on_site: OnSite = lambda delta: None,
    team: Team | None = None,
) -> Merged:
    """One adapter of several (delta, weight), which stay as they are; of kind ``merge:<method>``, factors in the base's
    dtype on the host, from products in float32. An adapter may be there more than once.

    Raises:
        InvalidRequest: a wrong option or weight, inputs that the method cannot merge (field of ``MergeOptions``, or
            ``inputs``), or a result that changes nothing.
        UnsupportedFeature: changes that have no sum; names input, site and reason.
    """
    method = check_options(options)
    backend = choose_merging(REFERENCE if options.svd_clamp else AUTO)  # where signs hang on how PEFT's products round
    draws = backend.draws(options.seed)
    combination = Combination(method, options.density, options.majority_sign_method, draws, backend)
    sums = sums_of(inputs, base, plain=method.is_sum)
    vocab_size, text = added_vocabulary(inputs), shared_text(inputs)
    _check_ranks(sums, options, method.form)
    team, max_rank = team or Team(), max(delta.max_rank for delta, _ in inputs)
    # two threads wait longer for each other's turn in Python than small operations take
    room = max((dense_bytes(found.site) for found in sums), default=0) if method.is_dense(options.svd_clamp) else None
    merger = _Merger(_FORMS[method.form], options, combination, base, max_rank, room, team.claim)
    sites: dict[str, SiteDelta] = {}
    begun = (Task(merger.begin(found), merger.room_of(found.site, len(found.parts))) for found in sums)
    with closing(team.in_order(begun, room)) as changes:  # also where an error keeps this frame
        for found, change in zip(sums, changes, strict=True):
            sites[found.site.name] = change
            on_site(change)
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
        {name: merger.errors[name] for name in sites if name in merger.errors},
    )


@dataclass(frozen=True, slots=True)
class _Merger:
    """Merges sites of one merge. ``low_rank`` begins with low-rank changes; ``max_rank``: the largest of the inputs;
    ``room``: bytes in which two sites may be merged at once, of which one may ``claim`` others on the way; None: they
    are not, where they do not go through dense changes. ``errors`` are gathered on the way."""

    low_rank: Callable[[_Merger, Site, Sequence[Part]], Rest[LowRank]]
    options: MergeOptions
    combination: Combination
    base: BaseView
    max_rank: int
    room: int | None
    claim: Callable[[int], None]
    errors: dict[str, float] = field(default_factory=dict)

    def begin(self, found: SiteSum) -> Rest[SiteDelta]:
        """Draws for a site what is drawn; what is left to do depends on no other site."""
        if (as_it_is := found.kept) is not None:
            return lambda: as_it_is
        low_rank = self.low_rank(self, found.site, parts) if (parts := found.parts) else None
        shifts, weights = found.shifts
        rows = [Operand(None, each.unsqueeze(0)) for each in shifts]
        shift = self.combination.begin(rows, weights) if rows else None

        def rest() -> SiteDelta:
            if (scale := found.scale) is not None:
                for vector in scale.tensors:
                    self.checked(found.site, vector)
                return scale
            return SiteDelta(
                None if low_rank is None else low_rank(),
                shift=None if shift is None else self.checked(found.site, whole(shift()).squeeze(0)),
            )

        return rest

    def room_of(self, site: Site, num_inputs: int, dtype: torch.dtype = torch.float32) -> int:
        """What it takes while the rest is done, in ``dtype``; 0 where that is more than all the room: then it keeps
        nobody out."""
        if self.room is None:
            return 0
        needed = room_of(site, num_inputs, self.max_rank, self.options, dtype)
        return needed if needed <= self.room else 0

    def checked(self, site: Site, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``. Raises InvalidRequest: weights took its values out of the range of its dtype."""
        # norms in float64 are finite where all values are, and are found far faster than isfinite looks
        for piece in torch.split(tensor.flatten(), _PIECE):
            if not bool(torch.linalg.vector_norm(piece, dtype=torch.float64).isfinite()):
                raise self.out_of_range(site, tensor.dtype)
        return tensor

    def out_of_range(self, site: Site, dtype: torch.dtype) -> InvalidRequest:
        return refusal("inputs", f"have weights with which {site.name!r} leaves the range of {dtype}")

    def in_range(self, site: Site, low_rank: LowRank) -> LowRank:
        """``low_rank``. Raises InvalidRequest."""
        self.checked(site, low_rank.a)
        self.checked(site, low_rank.b)
        return low_rank

    def rounded(self, site: Site, a: torch.Tensor, b: torch.Tensor) -> LowRank:
        """A and B in the base's dtype. Raises InvalidRequest."""
        return self.in_range(site, LowRank(a.to(self.base.dtype).contiguous(), b.to(self.base.dtype).contiguous(), 1.0))

    def clamped(self, site: Site, dense: Matrix, rank: int) -> LowRank:
        """Its largest components with outliers cut off. Raises InvalidRequest."""
        a, b = clamped(self.checked(site, whole(dense)), rank, self.options.svd_clamp, site.name)
        low_rank = self.rounded(site, a, b)
        self.errors[site.name] = distance_from(dense, low_rank)
        return low_rank

    def truncated(self, site: Site, found: Callable[[], Truncation], rank: int) -> LowRank:
        """Of the rank that is asked for, or of the least one within the error that is. Raises InvalidRequest."""
        try:
            truncation = found()
        except OverflowError:
            raise self.out_of_range(site, torch.float32) from None
        check = partial(self.in_range, site)
        if self.options.max_error:
            low_rank, error = kept_within(truncation, self.options.max_error, check, site.name)
        else:
            low_rank, error = kept(truncation, rank, check)
        self.errors[site.name] = error
        return low_rank


def _factor_wise(merger: _Merger, site: Site, parts: Sequence[Part]) -> Rest[LowRank]:
    a, b = merge_factors(parts, merger.combination)
    return lambda: merger.rounded(site, whole(a()), whole(b()))


def _cat(merger: _Merger, site: Site, parts: Sequence[Part]) -> Rest[LowRank]:
    """The exact sum, compressed where a rank or an error is asked for, or where its rank is more than the site's."""
    total, rank = LowRankSum(parts), merger.options.svd_rank or _size(site)
    if merger.options.max_error or rank < total.rank:
        return lambda: merger.truncated(site, lambda: total.truncation(merger.base.dtype), rank)
    return lambda: merger.in_range(site, total.whole(merger.base.dtype))


def _svd(merger: _Merger, site: Site, parts: Sequence[Part]) -> Rest[LowRank]:
    """The largest singular components of the merged dense change; of a plain sum without going through that."""
    options, dtype = merger.options, merger.base.dtype
    rank = min(options.svd_rank or merger.max_rank, _size(site))
    if not merger.combination.method.is_dense(options.svd_clamp):
        return lambda: merger.truncated(site, lambda: LowRankSum(parts).truncation(dtype), rank)
    dense = merge_dense(site, parts, merger.combination)
    if options.svd_clamp:
        return lambda: merger.clamped(site, dense(), rank)

    def in_double() -> None:
        merger.claim(merger.room_of(site, len(parts), torch.float64))

    wanted = None if options.max_error else rank
    find = partial(left_vectors, backend=merger.combination.backend, on_double=in_double)
    return lambda: merger.truncated(site, lambda: decompose(dense(), wanted, dtype, find), rank)


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
