"""Merging the dense changes of a site, and keeping the largest singular components of what comes of it.

One site's dense matrix at a time, with a few of its size beside it, however many inputs there are.

Source: peft 0.21 tuners/lora/model.py ``_svd_generalized_task_arithmetic_weighted_adapter``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch

from loraplex.adapters.delta import LowRank
from loraplex.adapters.merging.combination import Combination
from loraplex.adapters.merging.left_vectors import left_vectors
from loraplex.adapters.merging.options import refusal
from loraplex.adapters.merging.part import Part
from loraplex.adapters.merging.truncation import Truncation, balanced
from loraplex.models.sites import Site, SiteKind

#: elements of a matrix that are compared at once
_CHUNK_ELEMENTS: Final = 1 << 18


def merge_dense(site: Site, parts: Sequence[Part], combination: Combination) -> torch.Tensor:
    """The merged change, float32 ``[out, in]``."""
    weights = [part.weight for part in parts]
    memory = combination.scratch.of("dense", len(parts[0].low_rank.b), parts[0].low_rank.a.shape[1])
    matrices = (part.low_rank.dense(out=memory) for part in parts)
    if site.kind is SiteKind.EMBEDDING:
        # PEFT has it with a row for each token, and goes over its values so when it draws and when it picks
        return combination.of((matrix.T for matrix in matrices), weights).T
    return combination.of(matrices, weights)


def truncation(dense: torch.Tensor, rank: int | None = None) -> Truncation:
    """The singular value decomposition of ``dense`` ``[out, in]``; of its ``rank`` largest components, or of all.

    With the left singular vectors U of the shorter side ``U_r U_r^T D`` is the best approximation of rank r.
    """
    is_tall = dense.shape[0] > dense.shape[1]
    wide = dense.T if is_tall else dense
    values, u = left_vectors(wide, rank)

    def factors(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = u[:, :rank].float()
        a, b = balanced(chosen.T @ wide, chosen, values[:rank])
        return (b.T, a.T) if is_tall else (a, b)

    return Truncation(values, factors, _distance_from(dense))


def clamped(
    dense: torch.Tensor, rank: int, quantile: float, site: str
) -> tuple[torch.Tensor, torch.Tensor, Callable[[LowRank], float]]:
    """A ``[r, in]`` and B ``[out, r]`` of the largest components with their outliers cut off, float32; and the distance
    of a low-rank change from ``dense``.

    ``quantile`` is that of the values of ``U S`` and ``V^T`` together; what lies above it, or below its negative, is
    set to it. It depends on the signs of singular vectors, which are arbitrary: they are those of torch's SVD.

    Raises InvalidRequest: the quantile is no bound, because it is not positive.
    """
    u, values, vh = torch.linalg.svd(dense, full_matrices=False)
    b, a = u[:, :rank] * values[:rank], vh[:rank]
    bound = _quantile(torch.cat((b.flatten(), a.flatten())), quantile)
    if bound <= 0 and bool(dense.any()):
        raise refusal(
            "svd_clamp",
            f"{quantile:g} bounds nothing at {site!r}: that quantile of its values is {bound:.2g}, where a bound is "
            "positive; values near 1 cut outliers off (0.99)",
        )
    bound = max(bound, 0.0)
    return a.clamp(-bound, bound), b.clamp(-bound, bound), _distance_from(dense)


def _distance_from(dense: torch.Tensor) -> Callable[[LowRank], float]:
    """A low-rank change -> how far it is from ``dense``, relative to that."""

    def distance(other: LowRank) -> float:
        whole = float(torch.linalg.vector_norm(dense, dtype=torch.float64))
        a, step, squares = other.a.float(), max(1, _CHUNK_ELEMENTS // dense.shape[1]), 0.0
        for rows, b in zip(torch.split(dense, step), torch.split(other.b, step), strict=True):
            apart = torch.addmm(rows, b.float(), a, alpha=-other.scale)
            squares += float(torch.linalg.vector_norm(apart, dtype=torch.float64)) ** 2
        return math.sqrt(squares) / whole if whole else 0.0

    return distance


def _quantile(values: torch.Tensor, quantile: float) -> float:
    """``torch.quantile``, which takes no more than 2^24 values."""
    place = quantile * (len(values) - 1)
    below, above = (float(values.kthvalue(int(k) + 1).values) for k in (math.floor(place), math.ceil(place)))
    return below + (above - below) * (place - math.floor(place))
