"""Adapters that no file holds: made for a loaded model and its tables, for tests of what comes after the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from loraplex.adapters.delta import AdapterDelta, LowRank, SiteDelta
from loraplex.adapters.packed import PackedAdapter, pack_adapter
from loraplex.config import Config
from loraplex.engine.build import Load
from loraplex.engine.loader import LoadJob
from loraplex.errors import NotFound
from loraplex.models.base import BaseModel
from loraplex.types import Coverage

Make = Callable[[BaseModel], PackedAdapter]
DOWN = "model.layers.1.mlp.down_proj"
EMBEDDING = "model.embed_tokens"


def made(uid: str, sites: Mapping[str, SiteDelta] | None = None, **known: object) -> Make:
    """An adapter of these site deltas (one random low rank by default); ``known`` are fields of its AdapterFacts."""

    def make(model: BaseModel) -> PackedAdapter:
        deltas = {DOWN: low_rank(model, DOWN, seed=sum(map(ord, uid)))} if sites is None else dict(sites)
        packed = pack_adapter(AdapterDelta(uid, "lora", deltas, Coverage({}, {})), model.tables())
        return replace(packed, facts=replace(packed.facts, **known))  # type: ignore[arg-type]

    return make


def low_rank(model: BaseModel, site: str, *, rank: int = 2, seed: int = 0, scale: float = 1.0) -> SiteDelta:
    """Random factors that fit a site."""
    generator = torch.Generator().manual_seed(seed)
    fits = next(one for one in model.sites() if one.name == site)
    a = torch.randn(rank, fits.in_features, generator=generator)
    return SiteDelta(LowRank(a, torch.randn(fits.out_features, rank, generator=generator), scale))


def loads(adapters: Mapping[str, Make]) -> Callable[[Config, BaseModel], Load]:
    """A loader that finds these by their source."""

    def make_load(config: Config, model: BaseModel) -> Load:
        def load(job: LoadJob) -> PackedAdapter:
            if job.source not in adapters:
                raise NotFound(f"source {job.source!r} is not there")
            return adapters[job.source](model)

        return load

    return make_load
