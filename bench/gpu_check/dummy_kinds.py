"""Adapters of eight kinds for a model, made without files: one for each thing that a step may have to do for a kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.adapters.delta import AdapterDelta, LowRank, SiteDelta
from loraplex.adapters.packed import PackedAdapter, pack_adapter
from loraplex.adapters.telling import telling_tokens
from loraplex.engine.loader import LoadJob
from loraplex.layers.rows import Rows
from loraplex.models.base import BaseModel
from loraplex.models.sites import Site, SiteKind
from loraplex.types import Coverage
from loraplex_kernels.testing import random_factors

RANK: Final = 16
#: of LoHa's two factors, whose product is of the rank that is served
LOHA_RANK: Final = 8
#: rows of the embedding and of the head
TRAINED_TOKENS: Final = tuple(range(3, 67, 4))


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes changes of sites out of random values, the same ones again for the same seed."""

    model: BaseModel
    generator: torch.Generator

    def factors(self, site: Site, rank: int) -> LowRank:
        """A low-rank pair that adds a few percent."""
        a, b = random_factors(rank, site.in_features, site.out_features, self.generator)
        return LowRank(a.to(self.model.dtype), (b * 0.02).to(self.model.dtype), 1.0)

    def vector(self, size: int, around: float) -> torch.Tensor:
        """``[size]`` numbers near ``around``."""
        return around + 0.05 * torch.randn(size, generator=self.generator)

    def rows(self, site: Site, tokens: tuple[int, ...] = ()) -> Rows:
        """The base's own rows, all of them or those of ``tokens``, each a little longer."""
        weight = self.model.dense_weight(site.name)
        indices = torch.tensor(tokens) if tokens else None
        values = weight if indices is None else weight[indices.to(weight.device)]
        return Rows((values * 1.0625).cpu(), indices)


def _lora(make: Maker, site: Site) -> SiteDelta | None:
    return SiteDelta(make.factors(site, RANK)) if _is_layers_linear(site) else None


def _lora_bias(make: Maker, site: Site) -> SiteDelta | None:
    if not _is_layers_linear(site):
        return None
    return SiteDelta(make.factors(site, RANK), shift=make.vector(site.out_features, 0.0))


def _dora(make: Maker, site: Site) -> SiteDelta | None:
    if not _is_layers_linear(site):
        return None
    return SiteDelta(make.factors(site, RANK), out_scale=make.vector(site.out_features, 1.0))


def _loha(make: Maker, site: Site) -> SiteDelta | None:
    return SiteDelta(make.factors(site, LOHA_RANK**2)) if _is_layers_linear(site) else None


def _ia3(make: Maker, site: Site) -> SiteDelta | None:
    if site.module in ("k_proj", "v_proj"):
        return SiteDelta(out_scale=make.vector(site.out_features, 1.0))
    return SiteDelta(in_scale=make.vector(site.in_features, 1.0)) if site.module == "down_proj" else None


def _norms(make: Maker, site: Site) -> SiteDelta | None:
    return SiteDelta(rows=make.rows(site)) if site.kind is SiteKind.NORM else None


def _tokens(make: Maker, site: Site) -> SiteDelta | None:
    return SiteDelta(rows=make.rows(site, TRAINED_TOKENS)) if _is_end(site) else None


def _head(make: Maker, site: Site) -> SiteDelta | None:
    return SiteDelta(rows=make.rows(site)) if site.module == "lm_head" else None


def _is_layers_linear(site: Site) -> bool:
    return site.kind is SiteKind.LINEAR and not _is_end(site)


def _is_end(site: Site) -> bool:
    return site.module in ("embed_tokens", "lm_head")


Change = Callable[[Maker, Site], SiteDelta | None]

#: kinds whose steps are a graph's
TABLE_KINDS: Final[dict[str, Change]] = {
    "lora": _lora,
    "lora-bias": _lora_bias,
    "dora": _dora,
    "loha": _loha,
    "ia3": _ia3,
}
#: kinds with rows of their own, whose steps are launched kernel by kernel
ROW_KINDS: Final[dict[str, Change]] = {"norms": _norms, "tokens": _tokens, "head": _head}
KINDS: Final = {**TABLE_KINDS, **ROW_KINDS}


def load_kind(model: BaseModel, job: LoadJob) -> PackedAdapter:
    """What a loader's thread does for a source that names a kind; takes seconds at full size."""
    change = KINDS[job.source]
    make = Maker(model, torch.Generator().manual_seed(list(KINDS).index(job.source)))
    made = {site.name: change(make, site) for site in model.sites()}
    sites = {name: delta for name, delta in made.items() if delta is not None}
    telling = telling_tokens(sites, model.sites())
    delta = AdapterDelta(job.source, job.source, sites, Coverage({}, {}), telling_tokens=telling)
    return pack_adapter(delta, model.tables())
