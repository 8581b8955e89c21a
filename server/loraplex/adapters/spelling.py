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
from loraplex.models.sites import Alias, Site


@dataclass(frozen=True, slots=True)
class Spelling:
    """The aliases that an adapter uses; none: it has the base's own names."""

    aliases: tuple[Alias, ...] = ()

    @staticmethod
    def of(names: Iterable[str], base: BaseView) -> Spelling:
        """That of an adapter with tensors of these names: an alias is used where some begin so, and none as the base
        has it."""
        names = tuple(names)

        def any_below(begin: str) -> bool:
            return any(name.startswith(begin) for name in names)

        return Spelling(tuple(one for one in base.aliases if any_below(one.theirs) and not any_below(one.ours)))

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
        found = next((one for one in self.aliases if name.startswith(one.ours)), None)
        return name if found is None else found.theirs + name.removeprefix(found.ours)

    def _ours(self, name: str) -> str:
        found = next((one for one in self.aliases if name.startswith(one.theirs)), None)
        return name if found is None else found.ours + name.removeprefix(found.theirs)
