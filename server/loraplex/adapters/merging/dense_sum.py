"""Merging the dense changes of a site, and keeping the largest singular components of what comes of it.

The dense matrix is gone through block by block (``matrix.py``), and is never whole, but where outliers are cut off.

Source: peft 0.21 tuners/lora/model.py ``_svd_generalized_task_arithmetic_weighted_adapter``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from loraplex.adapters.delta import LowRank
from loraplex.adapters.merging.combination import Combination
from loraplex.adapters.merging.left_vectors import LeftVectors
from loraplex.adapters.merging.low_rank_sum import LowRankSum
from loraplex.adapters.merging.matrix import Matrix, Transpose, block, blocks, square
from loraplex.adapters.merging.options import refusal
from loraplex.adapters.merging.part import Part
from loraplex.adapters.merging.truncation import Truncation, roots_of, tails
from loraplex.models.sites import Site, SiteKind
from loraplex_kernels.merging import Operand


def merge_dense(site: Site, parts: Sequence[Part], combination: Combination) -> Callable[[], Matrix]:
    """The merged change ``[out, in]``; the rest of making it, as ``Combination.begin``."""
    weights = [part.weight for part in parts]
    changes = [Operand(part.low_rank.b, part.low_rank.a, part.low_rank.scale) for part in parts]
    if site.kind is SiteKind.EMBEDDING:
        # PEFT has it with a row for each token, and goes over its values so when it draws and when it picks
        rest = combination.begin([change.transpose for change in changes], weights)
        return lambda: Transpose(rest())
    return combination.begin(changes, weights)


Find = Callable[[Matrix, int | None], LeftVectors]
"""``left_vectors``, which knows by now how it multiplies."""


def decompose(dense: Matrix, rank: int | None, dtype: torch.dtype, find: Find) -> Truncation:
    """The singular value decomposition of ``dense`` ``[out, in]``; of its ``rank`` largest components, or of all, in
    ``dtype``.

    With the left singular vectors U of the shorter side ``U_r U_r^T D`` is the best approximation of rank r.

    Raises OverflowError: a value of it is not finite.
    """
    rows, columns = dense.shape
    wide = Transpose(dense) if rows > columns else dense
    found = find(wide, rank)

    @lru_cache(maxsize=1)  # asked for twice, and may go through all blocks
    def exact(rank: int) -> LowRank:
        roots = roots_of(found.values[:rank]).float()
        a, b = found.coordinates(rank) / roots.unsqueeze(1), found.vectors[:, :rank].float() * roots
        return LowRank(b.T, a.T, 1.0) if rows > columns else LowRank(a, b, 1.0)

    def low_rank(rank: int) -> LowRank:
        a, b = (factor.to(dtype).contiguous() for factor in (exact(rank).a, exact(rank).b))
        return LowRank(a, b, 1.0)

    def distance(other: LowRank) -> float:
        # what is left out is at a right angle to what is kept, and to its rounding, but for a product of two roundings
        left_out = float(left_outs[other.rank - 1])
        rounded = 0.0 if dtype == torch.float32 else LowRankSum([Part(exact(other.rank), 1.0)]).distance(other)
        return math.hypot(left_out, math.sqrt(1 - left_out**2) * rounded)

    left_outs = tails(found.values, found.rest)
    return Truncation(found.values, found.rest, low_rank, distance)


def clamped(dense: torch.Tensor, rank: int, quantile: float, site: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[r, in]`` and B ``[out, r]`` of the largest components with their outliers cut off, float32.

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
    return a.clamp(-bound, bound), b.clamp(-bound, bound)


def distance_from(dense: Matrix, other: LowRank) -> float:
    """How far a low-rank change is from ``dense``, relative to that."""
    a, b = other.a.float(), other.b.float()
    whole = apart = 0.0
    for at in blocks(dense):
        values = block(dense, at)
        whole += square(values)
        apart += square(torch.addmm(values, b[at.rows], a[:, at.columns], alpha=-other.scale))
    return math.sqrt(apart / whole) if whole else 0.0


def _quantile(values: torch.Tensor, quantile: float) -> float:
    """``torch.quantile``, which takes no more than 2^24 values."""
    place = quantile * (len(values) - 1)
    below, above = (float(values.kthvalue(int(k) + 1).values) for k in (math.floor(place), math.ceil(place)))
    return below + (above - below) * (place - math.floor(place))
