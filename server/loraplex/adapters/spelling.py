"""Names of modules as one adapter spells them: model code of the same family may call its parts by other names.

An adapter made with other code than transformers' own (``backbone.layers.0`` for ``model.layers.0``) names modules so
in its tensors and in all keys of its config. It is read against the base under those names; what comes of it has the
base's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.models.sites import Site


@dataclass(frozen=True, slots=True)
class Spelling:
    """The aliases that an adapter uses, each the beginning of names as it has them and as the base does; none: it has
    the base's own names."""

    aliases: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def of(names: Iterable[str], base: BaseView) -> Spelling:
        """That of an adapter with tensors of these names: an alias is used where some begin so, and none as the base
        has it."""
        names = tuple(names)

        def any_begins(begin: str) -> bool:
            return any(name.startswith(begin) for name in names)

        return Spelling(tuple((one, own) for one, own in base.aliases if any_begins(one) and not any_begins(own)))

    def view(self, base: BaseView) -> BaseView:
        """The base under the adapter's names."""
        if not self.aliases:
            return base
        norms = base.norms

        def row_norms(site: Site, change: LowRank) -> torch.Tensor:
            assert norms is not None
            return norms(replace(site, name=self._ours(site.name)), change)

        return replace(
            base,
            sites=tuple(replace(site, name=self._theirs(site.name)) for site in base.sites),
            weight=lambda name: base.weight(self._ours(name)),
            bias=lambda name: base.bias(self._ours(name)),
            norms=None if norms is None else row_norms,
        )

    def back(self, sites: Mapping[str, SiteDelta]) -> dict[str, SiteDelta]:
        """Changes of sites by the adapter's names -> by the base's."""
        return {self._ours(name): delta for name, delta in sites.items()}

    def _theirs(self, name: str) -> str:
        return _begun(name, tuple((own, one) for one, own in self.aliases))

    def _ours(self, name: str) -> str:
        return _begun(name, self.aliases)


def _begun(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """A module's name with the first pair's beginning that it has put as the other one; they end at a dot."""
    dotted = f"{name}."
    for begin, other in pairs:
        if dotted.startswith(begin):
            return f"{other}{dotted.removeprefix(begin)}".removesuffix(".")
    return name
