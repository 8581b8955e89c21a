"""LoHa: the elementwise product of two low-rank products, ``alpha / r * (w1_a w1_b) o (w2_a w2_b)``.

Its exact low-rank form is the Khatri-Rao one: with ``A[(i, j)] = w1_b[i] o w2_b[j]`` and ``B[:, (i, j)] = w1_a[:, i] o
w2_a[:, j]`` the change is ``B A``, of rank r^2. Where r^2 is more than the shorter side of the layer, the change itself
is one of the two factors and the identity the other: a matrix has no higher rank than its shorter side.

Sources: FedPara, arXiv:2108.06098; peft 0.21 tuners/loha/layer.py (``create_adapter_parameters``, ``make_weight``).
"""

from __future__ import annotations

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
    KeyRules,
    harmless,
    is_bool,
    is_number,
    served,
)
from loraplex.adapters.reading.ranked_targets import RANKED_TARGET_KEYS, RankedTargets
from loraplex.adapters.reading.site_tensors import SiteTensors, check_room, take_site_tensors, targeted_linears
from loraplex.errors import UnsupportedFeature
from loraplex.models.sites import Site

_PARTS: Final = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
#: of peft 0.21's LoHaConfig (tuners/loha/config.py)
LOHA_KEYS: Final[KeyRules] = MappingProxyType(
    {
        **COMMON_KEYS,
        **RANKED_TARGET_KEYS,
        "alpha": served(),
        "modules_to_save": served(),
        "rank_dropout": harmless(is_number),
        "module_dropout": harmless(is_number),
        "init_weights": harmless(is_bool),
        # of convolutions, which no served model has
        "use_effective_conv2d": harmless(is_bool),
    }
)


class LohaKind:
    """``hada_w1_a``, ``hada_w2_a``: ``[out, r]``; ``hada_w1_b``, ``hada_w2_b``: ``[r, in]``."""

    name: Final = "loha"
    keys: Final = LOHA_KEYS

    def matches(self, config: AdapterConfig) -> bool:
        return config.peft_type == "LOHA"

    def lower(self, files: AdapterFiles, base: BaseView) -> Lowered:
        """See ``AdapterKind.lower``."""
        asked = RankedTargets.of(files.config, "alpha")
        sites = targeted_linears(asked.rule, asked.targets, base)
        check_room({site: _exact_rank(site, asked.ranks.of(site.name), asked.where) for site in sites}, files, base)
        found = take_site_tensors(files.tensors, sites, _PARTS)
        return Lowered(
            {
                name: _delta(tensors, asked.ranks.of(name), asked.alphas.of(name), base)
                for name, tensors in found.items()
            }
        )


def _delta(tensors: SiteTensors, rank: int, alpha: float, base: BaseView) -> SiteDelta:
    site = tensors.site
    a1, a2 = (tensors.take(part, (site.out_features, rank), of_config=(1,)) for part in ("hada_w1_a", "hada_w2_a"))
    b1, b2 = (tensors.take(part, (rank, site.in_features), of_config=(0,)) for part in ("hada_w1_b", "hada_w2_b"))
    if rank * rank <= min(site.out_features, site.in_features):
        a = (b1.unsqueeze(1) * b2).flatten(0, 1)
        b = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1)
    elif site.out_features <= site.in_features:
        a, b = (a1 @ b1) * (a2 @ b2), torch.eye(site.out_features)
    else:
        a, b = torch.eye(site.in_features), (a1 @ b1) * (a2 @ b2)
    return SiteDelta(tensors.low_rank(a, b, alpha / rank, base.dtype))


def _exact_rank(site: Site, rank: int, where: str) -> int:
    """Of the low-rank form. Raises UnsupportedFeature: it does not fit."""
    exact = min(rank * rank, site.out_features, site.in_features)
    if exact > MAX_RANK:
        raise UnsupportedFeature(
            f"{where}: LoHa of rank {rank} at {site.name!r} ({site.out_features} x {site.in_features}) has an exact "
            f"low-rank form of rank {exact}; at most {MAX_RANK} is served",
            field="r",
        )
    return exact
