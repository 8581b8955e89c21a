"""The vocabulary as an adapter has it: an embedding and a head that were resized, or written over, before training.

Source: peft 0.21 utils/save_and_load.py ``get_peft_model_state_dict`` ("DEAL WITH EMBEDDINGS"): where the vocabulary
was resized, an end is targeted, or the caller asks for it, the embedding and the head are saved as they are under the
adapter. Loaded again, those copies replace the base's own matrix, and a tied pair is one matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.reading.keys import MAX_TOKENS
from loraplex.adapters.reading.tensors import TensorBag
from loraplex.adapters.saved.modules import ORIGINAL, SavedModules
from loraplex.adapters.saved.own_rows import Whole, differing, fitted, laid_over, overlaid
from loraplex.adapters.saved.trained_tokens import ALONE, BESIDE, TrainedTokens
from loraplex.errors import InvalidAdapter, Mismatch
from loraplex.layers.rows import Rows
from loraplex.models.sites import Site, SiteKind

#: where a copy lies below an end's name, and under what it was saved
PLAIN: Final = ".weight"  # nothing that PEFT put there
ADAPTED: Final = ".base_layer.weight"  # the adapter's own layer
TOKENS: Final = ".token_adapter.base_layer.weight"  # trained tokens beside the adapter


@dataclass(frozen=True, slots=True)
class Copies:
    """Copies of the matrices under an adapter: end -> ``[n, hidden]``, and end -> where its copy lay."""

    tensors: Mapping[str, torch.Tensor]
    under: Mapping[str, str]


def read_copies(bag: TensorBag, base: BaseView, saved: SavedModules) -> Copies:
    """Take the ends' copies out of the bag. Raises InvalidAdapter: two of one end; Mismatch: another hidden size."""
    tensors = dict(saved.originals)
    under = dict.fromkeys(tensors, f".{ORIGINAL}")
    for site in base.sites:
        if not site.is_end:
            continue
        if site.name in tensors:
            _check_shape(site, tensors[site.name], bag.where)
        for suffix in (PLAIN, ADAPTED, TOKENS):
            copy = bag.take(site.name + suffix)
            if copy is None:
                continue
            if site.name in tensors:
                raise InvalidAdapter(
                    f"{bag.where}: two copies of the base's {site.name!r}: '{under[site.name]}' and '{suffix}'"
                )
            _check_shape(site, copy, bag.where)
            tensors[site.name], under[site.name] = copy, suffix
    if base.tied and len(tensors) > 1:
        (one, first), (other, second) = tensors.items()
        if not torch.equal(first, second):
            raise InvalidAdapter(f"{bag.where}: the copies of {one!r} and {other!r} differ, though the base ties them")
    return Copies(tensors, under)


def _check_shape(site: Site, copy: torch.Tensor, where: str) -> None:
    expected = site.weight_shape
    if copy.dim() != 2 or copy.shape[1] != expected[1]:
        raise Mismatch(
            f"{where}: the copy of {site.name!r} has shape {list(copy.shape)}, the base model's is {list(expected)}: "
            f"it was made for another base model"
        )


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The size of an adapter's vocabulary, and its rows under the kind's own change: site -> what is not the base's."""

    size: int
    added: int
    rows: Mapping[str, Rows]

    def view(self, base: BaseView) -> BaseView:
        """The base model as the adapter was trained on it: what a kind lowers against."""
        if not self.rows and not self.added:
            return base
        return replace(
            base,
            sites=tuple(self._resized(site) for site in base.sites),
            weight=lambda name: self._weight(name, base),
            vocab_size=self.size,
            norms=None,  # of other weights than the base's
        )

    def _resized(self, site: Site) -> Site:
        if not site.is_end or not self.added:
            return site
        is_embedding = site.kind is SiteKind.EMBEDDING
        return replace(site, in_features=self.size) if is_embedding else replace(site, out_features=self.size)

    def _weight(self, name: str, base: BaseView) -> torch.Tensor:
        weight = base.weight(name)
        num_rows = self.size if name in {site.name for site in base.ends()} else len(weight)
        return laid_over(weight, self.rows.get(name), num_rows)


@dataclass(frozen=True, slots=True)
class Parts:
    """All that changes an adapter's vocabulary, as it was read."""

    copies: Copies
    saved: SavedModules
    tokens: TrainedTokens
    where: str


def vocabulary_of(parts: Parts, base: BaseView) -> Vocabulary:
    """Raises InvalidAdapter: token ids past the vocabulary, or without a row; Mismatch: sizes that disagree."""
    size = _size(parts, base)
    for name, original in parts.saved.originals.items():
        if not base.vocab_size <= len(original) <= size:
            raise Mismatch(
                f"{parts.where}: what lies behind the saved {name!r} has {len(original)} rows, expected "
                f"{base.vocab_size} to {size}, the sizes of the base model's vocabulary and of the adapter's"
            )
    rows: dict[str, Rows] = {}
    for site in base.sites:
        found = _rows_of(site, parts, base)
        if found is not None:
            rows[site.name] = found
    vocabulary = Vocabulary(size, size - base.vocab_size, rows)
    if vocabulary.added:
        _check_covered(vocabulary, parts, base)
    return vocabulary


def _size(parts: Parts, base: BaseView) -> int:
    """How many tokens the adapter knows."""
    whole = {name: len(tensor) for name, tensor in parts.copies.tensors.items()}
    saved = parts.saved.sites
    whole |= {site.name: len(saved[site.name].weight) for site in base.ends() if site.name in saved}
    if len(set(whole.values())) > 1:
        shown = ", ".join(f"{name!r} {rows}" for name, rows in whole.items())
        raise Mismatch(f"{parts.where}: embedding and head disagree on the vocabulary's size: {shown}")
    size = next(iter(whole.values()), 0)
    if whole and size < base.vocab_size:
        raise Mismatch(
            f"{parts.where}: a vocabulary of {size} tokens, the base model has {base.vocab_size}: a smaller one is not "
            f"served"
        )
    for site in base.sites:
        trained = parts.tokens.rows.get(site.name)
        last = -1 if trained is None else int(_indices(trained)[-1])
        if not site.is_end and last >= site.out_features:
            raise InvalidAdapter(f"{parts.where}: {parts.tokens.key}: {site.name!r} has no row {last}")
        if whole and site.is_end and last >= size:
            raise InvalidAdapter(
                f"{parts.where}: {parts.tokens.key}: token {last} lies past the vocabulary of {size} tokens"
            )
        size = max(size, last + 1 if site.is_end else 0)
    size = max(size, base.vocab_size)
    if size - base.vocab_size > MAX_TOKENS:
        named = "" if whole else f"{parts.tokens.key}: token {size - 1}: "
        raise InvalidAdapter(
            f"{parts.where}: {named}a vocabulary of {size} tokens; at most {MAX_TOKENS} may be added to the base "
            f"model's {base.vocab_size}"
        )
    return size


def _rows_of(site: Site, parts: Parts, base: BaseView) -> Rows | None:
    """The site's rows under the kind's change: the base's copy, and trained tokens on top of it."""
    copy = parts.copies.tensors.get(site.name)
    if copy is None and base.tied and site.is_end:
        copy = next(iter(parts.copies.tensors.values()), None)
    what = f"{parts.where}: the copy of {site.name!r}"
    rows = None if copy is None else differing(Whole(copy), Whole(base.weight(site.name)), what)
    trained = parts.tokens.rows.get(site.name)
    if trained is None:
        return rows
    values = fitted(trained.values, base.dtype, f"{parts.where}: the trained tokens of {site.name!r}")
    return overlaid(rows, replace(trained, values=values))


def _check_covered(vocabulary: Vocabulary, parts: Parts, base: BaseView) -> None:
    """Raises InvalidAdapter: an added token without a row at the embedding or the head."""
    added = torch.arange(base.vocab_size, vocabulary.size)
    for site in base.sites:
        if not site.is_end or site.name in parts.saved.sites:
            continue
        rows = vocabulary.rows.get(site.name)
        missing = added if rows is None else added[~torch.isin(added, _indices(rows))]
        if len(missing):
            raise InvalidAdapter(
                f"{parts.where}: a vocabulary of {vocabulary.size} tokens, but token {int(missing[0])} has no row at "
                f"{site.name!r} ({len(missing)} of {len(added)} added tokens have none): save the adapter with "
                f"save_embedding_layers=True"
            )


def _indices(rows: Rows) -> torch.Tensor:
    return torch.arange(len(rows.values)) if rows.indices is None else rows.indices


def check_under(copies: Copies, tokens: TrainedTokens, adapted: Collection[str], where: str) -> None:
    """Raises Mismatch: a copy lies under something that is not there, so that PEFT would pass it over."""
    for name, suffix in copies.under.items():
        alone = tokens.key == ALONE and name in tokens.rows
        fits = {
            PLAIN: name not in adapted and name not in tokens.rows,
            ADAPTED: name in adapted or alone,
            TOKENS: tokens.key == BESIDE and name in tokens.rows,
        }
        if not fits.get(suffix, True):
            raise Mismatch(f"{where}: tensor '{name}{suffix}' lands nowhere: {name!r} is not adapted so")
