"""Changes of one site that is as large as a real model's, made up: what a merge holds of it, whatever the base is."""

from __future__ import annotations

from typing import Final

import torch

from bench.merging.methods import EQUAL_RANKS, WEIGHTS
from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta, LowRank, SiteDelta
from loraplex.models.sites import Site, SiteKind
from loraplex.types import Coverage

NAME: Final = "made up"
#: ``[out, in]``: the largest linear layers of an 8B Llama
SHAPE: Final = (14336, 4096)


def large_site(
    shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16
) -> tuple[BaseView, list[tuple[AdapterDelta, float]]]:
    """A base of that one site, whose weight nobody asks for, and adapters of it with their weights."""
    out_features, in_features = shape

    def nothing(name: str) -> torch.Tensor:
        raise AssertionError(f"a merge asked for the weight of {name}")

    site = Site(NAME, SiteKind.LINEAR, in_features, out_features)
    base = BaseView((site,), dtype, weight=nothing, bias=nothing, tied=False, vocab_size=1)
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for rank, weight in zip(EQUAL_RANKS, WEIGHTS, strict=True):
        a, b = (torch.randn(size, generator=generator) for size in ((rank, in_features), (out_features, rank)))
        change = SiteDelta(LowRank(a.to(dtype), b.to(dtype), 2.0))
        inputs.append((AdapterDelta(NAME, "lora", {NAME: change}, Coverage({}, {})), weight))
    return base, inputs
