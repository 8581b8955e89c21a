"""Norms of the rows of ``W + scale B A``: what a DoRA's magnitudes are held against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch

from loraplex.adapters.delta import LowRank
from loraplex.models.sites import Site, SiteKind

#: elements of a weight that are taken to float32 at once
_CHUNK_ELEMENTS: Final = 1 << 24


def row_norms(weight: torch.Tensor, change: LowRank) -> torch.Tensor:
    """``||W + scale B A||`` of every output, float32 ``[out]``; ``weight`` is ``[out, in]``."""
    return torch.cat([torch.linalg.vector_norm(rows, dim=1) for rows in _changed(weight, change)])


def squared_row_norms(weight: torch.Tensor, change: LowRank) -> torch.Tensor:
    """Their squares, float64: those of a matrix that is cut by its inputs are the sums of its parts'."""
    norms = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in _changed(weight, change)]
    return torch.cat(norms).square()


def as_matrix(weight: torch.Tensor, site: Site) -> torch.Tensor:
    """A site's weight as ``[out, in]``: an embedding's is kept the other way round."""
    return weight.T if site.kind is SiteKind.EMBEDDING else weight


def _changed(weight: torch.Tensor, change: LowRank) -> Iterator[torch.Tensor]:
    """``W + scale B A`` in float32, some rows at a time."""
    a, step = change.a.float(), max(1, _CHUNK_ELEMENTS // max(weight.shape[1], 1))
    for rows, b in zip(torch.split(weight, step), torch.split(change.b, step), strict=True):
        yield rows.float() + change.scale * (b.float() @ a)
