"""What PEFT gives every kind beside its own tensors: saved modules, trained tokens, a vocabulary of its own.

Read before the kind lowers its tensors, because a kind works on what lies under it: an embedding that was resized, or
rows that were trained. Merged afterwards into the kind's sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import SiteDelta
from loraplex.adapters.reading.adapter_files import AdapterFiles
from loraplex.adapters.saved.modules import KEY, read_saved_modules
from loraplex.adapters.saved.own_rows import Whole, atop, differing, fitted
from loraplex.adapters.saved.trained_tokens import read_trained_tokens
from loraplex.adapters.saved.vocabulary import Parts, Vocabulary, check_under, read_copies, vocabulary_of
from loraplex.errors import UnsupportedFeature
from loraplex.layers.rows import Rows
from loraplex.models.sites import Site, SiteKind

#: why a site with such rows is no term of a sum
_SAVED = "a saved module"
_TRAINED = "trained tokens"
_ADDED = "added vocabulary"


@dataclass(frozen=True, slots=True)
class Saved:
    """The parts that were read, against ``base``. ``vocab_size``: of the adapter, where it adds tokens; else 0."""

    parts: Parts
    vocabulary: Vocabulary
    base: BaseView

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size if self.vocabulary.added else 0

    def view(self) -> BaseView:
        """The base model under the kind's own change: what the kind is to lower against."""
        return self.vocabulary.view(self.base)

    def merged(self, sites: Mapping[str, SiteDelta]) -> dict[str, SiteDelta]:
        """The kind's ``sites`` and these, together, by the base's own sizes.

        Raises UnsupportedFeature: both change one module in a way that PEFT refuses; Mismatch: a stray copy.
        """
        self._check_apart(sites)
        check_under(self.parts.copies, self.parts.tokens, sites.keys(), self.parts.where)
        found = dict(sites)
        for site in self.base.sites:
            rows, why = self._rows(site)
            delta = found.get(site.name)
            if rows is None:
                continue
            if delta is None:
                found[site.name] = SiteDelta(rows=rows, exclusive=why)
            else:
                wide = bool(self.vocabulary.added) and site.is_end
                rows = rows if delta.rows is None else atop(rows, delta.rows, len(self.base.weight(site.name)))
                changed = _narrowed(delta, rows, site, self.parts.where) if wide else replace(delta, rows=rows)
                found[site.name] = replace(changed, exclusive=delta.exclusive or why)
        return found

    def _rows(self, site: Site) -> tuple[Rows | None, str]:
        """The site's own rows, and why they are no term of a sum."""
        saved = self.parts.saved.sites.get(site.name)
        if saved is not None:
            base = Whole(self.base.weight(site.name), self.base.bias(site.name))
            return differing(saved, base, f"{self.parts.where}: the saved {site.name!r}"), _SAVED
        trained = site.name in self.parts.tokens.rows
        return self.vocabulary.rows.get(site.name), _TRAINED if trained else _ADDED if self.vocabulary.added else _SAVED

    def _check_apart(self, sites: Mapping[str, SiteDelta]) -> None:
        tokens, where = self.parts.tokens, self.parts.where
        for name in self.parts.saved.sites:
            if name in sites or name in tokens.rows:
                other = "adapted" if name in sites else f"named by {tokens.key}"
                raise UnsupportedFeature(
                    f"{where}: {KEY} saves {name!r}, which is {other} as well: PEFT cannot do both", field=KEY
                )
        for name in tokens.rows:
            # a tied head's rows lie below its adapter; elsewhere PEFT would have to wrap the adapter
            if name != tokens.tied and name in sites:
                raise UnsupportedFeature(
                    f"{where}: {tokens.key} names {name!r}, which is adapted as well: PEFT cannot do both",
                    field=tokens.key,
                )


def read_saved(files: AdapterFiles, base: BaseView) -> Saved:
    """Take all of this out of the bag.

    Raises:
        InvalidAdapter, Mismatch, UnsupportedFeature: see the parts.
    """
    where = files.tensors.where
    saved = read_saved_modules(files, base)
    tokens = read_trained_tokens(files, base)
    parts = Parts(read_copies(files.tensors, base, saved), saved, tokens, where)
    return Saved(parts, vocabulary_of(parts, base), base)


def _narrowed(delta: SiteDelta, rows: Rows, site: Site, where: str) -> SiteDelta:
    """A change of an end with added tokens, made to the base's size: all that it does to the added ones but the input's
    scale goes into their rows."""
    narrow = _narrowed_embedding if site.kind is SiteKind.EMBEDDING else _narrowed_head
    return narrow(delta, rows, site, where)


def _narrowed_head(delta: SiteDelta, rows: Rows, site: Site, where: str) -> SiteDelta:
    """A head's rows, and its vectors, are its tokens'."""
    known = site.out_features
    added, ids = _added(rows, known)
    values, low_rank, out_scale, shift = rows.values[added].float(), delta.low_rank, delta.out_scale, delta.shift
    if low_rank is not None:
        values = values + low_rank.scale * (low_rank.b[ids].float() @ low_rank.a.float())
        low_rank = replace(low_rank, b=low_rank.b[:known].contiguous())
    if out_scale is not None:
        values, out_scale = values * out_scale[ids].unsqueeze(1), out_scale[:known].contiguous()
    if shift is not None:
        if bool(shift[ids].any()):
            raise UnsupportedFeature(
                f"{where}: a bias at {site.name!r} for added tokens is not served; adapters may add tokens or a bias",
                field="bias",
            )
        shift = shift[:known].contiguous()
    rows = _with_values(rows, added, values, f"{where}: the added tokens of {site.name!r}")
    return replace(delta, low_rank=low_rank, out_scale=out_scale, shift=shift, rows=rows)


def _narrowed_embedding(delta: SiteDelta, rows: Rows, site: Site, where: str) -> SiteDelta:
    """An embedding's rows are its tokens', its vectors every token's."""
    known = site.in_features
    added, ids = _added(rows, known)
    values, low_rank = rows.values[added].float(), delta.low_rank
    if low_rank is not None:
        values = values + low_rank.scale * (low_rank.a[:, ids].T.float() @ low_rank.b.T.float())
        low_rank = replace(low_rank, a=low_rank.a[:, :known].contiguous())
    if delta.out_scale is not None:
        values = values * delta.out_scale
    if delta.shift is not None:
        values = values + delta.shift
    rows = _with_values(rows, added, values, f"{where}: the added tokens of {site.name!r}")
    return replace(delta, low_rank=low_rank, rows=rows)


def _added(rows: Rows, known: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of ``rows`` stand for tokens past the ``known`` ones, and their ids."""
    assert rows.indices is not None
    added = rows.indices >= known
    return added, rows.indices[added]


def _with_values(rows: Rows, which: torch.Tensor, values: torch.Tensor, what: str) -> Rows:
    merged = rows.values.clone()
    merged[which] = fitted(values, rows.values.dtype, what)
    return replace(rows, values=merged)
