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
    ConfigReader,
    KeyRules,
    harmless,
    is_bool,
    is_number,
    is_object,
    served,
)
from loraplex.adapters.reading.site_tensors import SiteTensors, check_room, take_site_tensors, targeted_linears
from loraplex.adapters.reading.targets import Targets
from loraplex.errors import UnsupportedFeature
from loraplex.models.sites import Site

_PARTS: Final = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
#: of peft 0.21's LoHaConfig (tuners/loha/config.py)
LOHA_KEYS: Final[KeyRules] = MappingProxyType(
    {
        **COMMON_KEYS,
        "r": served(),
        "alpha": served(),
        "target_modules": served(),
        "exclude_modules": served(),
        "layers_to_transform": served(),
        "layers_pattern": served(),
        "rank_pattern": served(is_object),
        "alpha_pattern": served(is_object),
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
        reader = ConfigReader(files.config)
        rule = reader.target_rule()
        targets = Targets(rule)
        ranks = targets.per_module("rank_pattern", reader.rank_pattern(), reader.rank("r", 8))
        alphas = targets.per_module("alpha_pattern", reader.alpha_pattern(), reader.alpha("alpha", 8))
        sites = targeted_linears(rule, targets, base)
        check_room({site: _exact_rank(site, ranks.of(site.name), rule.where) for site in sites}, files, base)
        found = take_site_tensors(files.tensors, sites, _PARTS)
        return Lowered(
            {name: _delta(tensors, ranks.of(name), alphas.of(name), base) for name, tensors in found.items()}
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
