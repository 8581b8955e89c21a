"""LoKr: a Kronecker product, ``alpha / r * kron(w1, w2)``, each of the two whole or itself a product of two factors.

With ``w1 = p1 q1`` and ``w2 = p2 q2`` the change is ``kron(p1, p2) kron(q1, q2)``: exact, of the product of both ranks.
A matrix that is saved whole is its own factor beside the identity, of the rank of its shorter side. The form *fits*
when the product of both ranks is at most ``MAX_RANK``, the highest rank that is served; otherwise it is refused.

Sources: arXiv:2309.14859; peft 0.21 tuners/lokr/layer.py (``update_layer``, ``factorization``, ``make_kron``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import SiteDelta
from loraplex.adapters.kinds.base import Lowered
from loraplex.adapters.reading.adapter_files import AdapterFiles
from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.keys import (
    COMMON_KEYS,
    MAX_RANK,
    ConfigReader,
    KeyRules,
    harmless,
    is_bool,
    is_bool_or_text,
    is_number,
    served,
)
from loraplex.adapters.reading.ranked_targets import RANKED_TARGET_KEYS, RankedTargets
from loraplex.adapters.reading.site_tensors import SiteTensors, check_room, take_site_tensors, targeted_linears
from loraplex.errors import UnsupportedFeature
from loraplex.models.sites import Site

_PARTS: Final = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
#: of peft 0.21's LoKrConfig (tuners/lokr/config.py)
LOKR_KEYS: Final[KeyRules] = MappingProxyType(
    {
        **COMMON_KEYS,
        **RANKED_TARGET_KEYS,
        "alpha": served(),
        "decompose_both": served(),
        "decompose_factor": served(),
        "modules_to_save": served(),
        "rank_dropout": harmless(is_number),
        "rank_dropout_scale": harmless(is_bool),
        "module_dropout": harmless(is_number),
        "init_weights": harmless(is_bool_or_text),
        # of convolutions, which no served model has
        "use_effective_conv2d": harmless(is_bool),
    }
)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What the config says of one site: the shapes of w1 and w2, the rank of what is decomposed, and the scale."""

    w1: tuple[int, int]
    w2: tuple[int, int]
    rank: int
    scale: float
    decompose_both: bool

    @property
    def is_w1_whole(self) -> bool:
        """PEFT's rule: a matrix is decomposed where that makes it smaller, and w1 only on demand."""
        return not (self.decompose_both and self.rank < max(self.w1) / 2)

    @property
    def is_w2_whole(self) -> bool:
        return not self.rank < max(self.w2) / 2

    def exact_rank(self, site: Site, where: str) -> int:
        """Of the low-rank form. Raises UnsupportedFeature: it does not fit."""
        of_w1 = min(self.w1) if self.is_w1_whole else min(self.rank, *self.w1)
        of_w2 = min(self.w2) if self.is_w2_whole else min(self.rank, *self.w2)
        if of_w1 * of_w2 > MAX_RANK:
            raise UnsupportedFeature(
                f"{where}: LoKr at {site.name!r} has an exact low-rank form of rank {of_w1 * of_w2} ({of_w1} of w1 by "
                f"{of_w2} of w2); at most {MAX_RANK} is served: train it with a smaller r or decompose_factor",
                field="r",
            )
        return of_w1 * of_w2


class LokrKind:
    """``lokr_w1`` ``[l, m]`` or ``lokr_w1_a`` ``[l, r]`` and ``lokr_w1_b`` ``[r, m]``; ``lokr_w2`` ``[k, n]`` likewise;
    out is ``l * k``, in is ``m * n``."""

    name: Final = "lokr"
    keys: Final = LOKR_KEYS

    def matches(self, config: AdapterConfig) -> bool:
        return config.peft_type == "LOKR"

    def lower(self, files: AdapterFiles, base: BaseView) -> Lowered:
        """See ``AdapterKind.lower``."""
        asked, reader = RankedTargets.of(files.config, "alpha"), ConfigReader(files.config)
        factor, both = reader.integer("decompose_factor", -1, minimum=-1), reader.flag("decompose_both")
        sizes: dict[Site, _Sizes] = {}
        for site in targeted_linears(asked.rule, asked.targets, base):
            out, in_ = (_factorization(size, factor) for size in (site.out_features, site.in_features))
            rank = asked.ranks.of(site.name)
            sizes[site] = _Sizes((out[0], in_[0]), (out[1], in_[1]), rank, asked.alphas.of(site.name) / rank, both)
        check_room({site: each.exact_rank(site, asked.where) for site, each in sizes.items()}, files, base)
        found = take_site_tensors(files.tensors, sizes.keys(), _PARTS)
        return Lowered({site.name: _delta(found[site.name], each, base) for site, each in sizes.items()})


def _delta(tensors: SiteTensors, sizes: _Sizes, base: BaseView) -> SiteDelta:
    p1, q1 = _factors(tensors, "lokr_w1", sizes.w1, None if sizes.is_w1_whole else sizes.rank)
    p2, q2 = _factors(tensors, "lokr_w2", sizes.w2, None if sizes.is_w2_whole else sizes.rank)
    return SiteDelta(tensors.low_rank(torch.kron(q1, q2), torch.kron(p1, p2), sizes.scale, base.dtype))


def _factors(
    tensors: SiteTensors, part: str, shape: tuple[int, int], rank: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """p ``[rows, q]`` and q ``[q, columns]`` with p q = the matrix of this name. ``rank``: None where it is whole."""
    rows, columns = shape
    if rank is not None:
        a = tensors.take(f"{part}_a", (rows, rank), of_config=(1,))
        b = tensors.take(f"{part}_b", (rank, columns), of_config=(0,))
        if rank <= min(rows, columns):
            return a, b
        whole = a @ b
    else:
        # both sides follow from the config's decompose_factor and the layer's shape together
        whole = tensors.take(part, shape, of_config=(0, 1))
    return (torch.eye(rows), whole) if rows <= columns else (whole, torch.eye(columns))


def _factorization(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is ``size``, the smaller first: ``factor`` itself where it divides, else the divisors
    nearest to each other of which the smaller is at most ``factor`` (-1: any).

    A factor that divides comes first as it is, be it the larger one.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small = max((n for n in range(1, math.isqrt(size) + 1) if size % n == 0 and n <= limit), default=1)
    return small, size // small
