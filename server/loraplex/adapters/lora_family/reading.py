"""An adapter of the LoRA family as its files hold it: every targeted site's pair, checked, and the biases beside them.

What the kinds of the family share; each makes of a pair what its own formula says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import SiteDelta
from loraplex.adapters.lora_family.plan import LoraPlan
from loraplex.adapters.lora_family.tensors import (
    Blocks,
    LandedFactors,
    LoraPair,
    check_range,
    land_factors,
    whole_a,
    whole_b,
)
from loraplex.adapters.reading.adapter_files import AdapterFiles
from loraplex.adapters.reading.biases import OwnBiases
from loraplex.adapters.reading.site_tensors import check_room
from loraplex.adapters.reading.stray import refuse_stray
from loraplex.adapters.reading.tensors import TensorBag
from loraplex.errors import InvalidAdapter, Mismatch, UnsupportedFeature
from loraplex.models.sites import Site, SiteKind

#: what comes beside a pair, and is taken where a kind has its meaning
_TAKEN_LATER: Final = (".lora_B.bias", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")


@dataclass(frozen=True, slots=True)
class LoraReading:
    """The pairs in site order. ``biases``: the adapter's own, of targeted sites and others; that of a pair's site is in
    its shift already."""

    pairs: tuple[LoraPair, ...]
    biases: OwnBiases
    where: str

    def completed(self, deltas: dict[str, SiteDelta]) -> dict[str, SiteDelta]:
        """``deltas`` of the pairs' sites, with the biases of all other sites.

        Raises InvalidAdapter: values leave the range of the base's dtype.
        """
        for name, delta in deltas.items():
            check_range(name, delta, self.where)
        return self.biases.beside(deltas)


def read_lora(files: AdapterFiles, base: BaseView, blocks: Callable[[Site], Blocks] | None = None) -> LoraReading:
    """Take the factors and biases out of the files. ``blocks``: how a site's pair is saved; None: all are dense.

    Raises as ``AdapterKind.lower``; OverCapacity: blocks that are far smaller than the matrices they stand for.
    """
    plan, bag = LoraPlan.of(files.config), files.tensors
    reader = _Reader(plan, bag, base, land_factors(bag, base), plan.tied_head(base))
    targeted = reader.select()
    if blocks is not None:
        check_room(
            {site: plan.modules.ranks.of(site.name) for site in base.sites if site.name in targeted}, files, base
        )
    biases = plan.biases.take(bag, base, targeted, plan.modules.targets.is_saved)
    pairs = [
        reader.pair(site, Blocks() if blocks is None else blocks(site), biases.shifts.get(site.name))
        for site in base.sites
        if site.name in targeted
    ]
    return LoraReading(tuple(pairs), biases, bag.where)


@dataclass(frozen=True, slots=True)
class _Reader:
    plan: LoraPlan
    bag: TensorBag
    base: BaseView
    landed: LandedFactors
    tied: dict[str, str]

    def select(self) -> set[str]:
        """The sites that config and tensors agree on."""
        targeted = self.plan.select(self.base)
        if not targeted or not targeted <= self.landed.a.keys() & self.landed.b.keys():
            # tensors under another name say more than the sites that lack them
            stray = [name for name in self.bag.left if ".lora_" in name and not name.endswith(_TAKEN_LATER)]
            refuse_stray(stray, self.base, self.bag.where)
        if not targeted:
            raise self.plan.modules.rule.matches_none(self.base.modules())
        self.landed.check(targeted, self.bag.where)
        for head, embedding in self.tied.items():
            if not self.landed.is_turned(head, embedding):
                raise InvalidAdapter(
                    f"{self.bag.where}: ensure_weight_tying is set in {self.plan.modules.where}, but the factors of "
                    f"{head!r} are not those of {embedding!r} turned around"
                )
        return targeted

    def pair(self, site: Site, blocks: Blocks, own_bias: torch.Tensor | None) -> LoraPair:
        where = self.bag.where
        rank = self.plan.modules.ranks.of(self.tied.get(site.name, site.name))
        a = whole_a(self.landed.a[site.name], site, rank, blocks.a, where)
        b = whole_b(self.landed.b[site.name], site, rank, blocks.b, where)
        pair = LoraPair(site, a, b, self.plan.scale(site.name), own_bias)
        # a block-diagonal B is a layer of its own in PEFT, which has no bias
        return self._with_bias_of_b(pair) if self.plan.lora_bias and blocks.b == 1 else pair

    def _with_bias_of_b(self, pair: LoraPair) -> LoraPair:
        site, where = pair.site, self.bag.where
        if site.kind is not SiteKind.LINEAR:
            raise UnsupportedFeature(
                f"{self.plan.modules.where}: lora_bias is not served for {site.name!r}: PEFT has none for embeddings",
                field="lora_bias",
            )
        found = self.bag.take(f"{site.name}.lora_B.bias")
        if found is None:
            raise InvalidAdapter(f"{where}: lora_bias is set, but {site.name!r} has no lora_B.bias")
        if tuple(found.shape) != (site.out_features,):
            raise Mismatch(
                f"{where}: lora_B.bias of {site.name!r} has shape {list(found.shape)}, expected [{site.out_features}]"
            )
        shift = found.float() * pair.scale
        return replace(pair, shift=shift if pair.shift is None else shift + pair.shift)
