"""LoRA and rsLoRA: ``scale * B A`` with ``scale = alpha / r`` or ``alpha / sqrt(r)``, rank and alpha per module.

Sources: LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; peft 0.21 tuners/lora/layer.py ``update_layer`` (scaling) and
utils/save_and_load.py (tensor names).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.config_file import AdapterConfig
from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.adapters.keys import (
    COMMON_KEYS,
    ConfigReader,
    KeyRules,
    harmless,
    is_bool,
    is_bool_or_text,
    is_list,
    is_list_or_object,
    is_number,
    is_object,
    is_text,
    refused,
    served,
)
from loraplex.adapters.kinds.base import AdapterFiles, Lowered
from loraplex.adapters.targets import PerModule, TargetRule, Targets
from loraplex.adapters.tensors import TensorBag
from loraplex.errors import InvalidAdapter, Mismatch
from loraplex.models.sites import Site, SiteKind

#: per site kind: the suffixes of A ``[r, in]`` and B ``[out, r]``
_SUFFIXES: Final = {
    SiteKind.LINEAR: (".lora_A.weight", ".lora_B.weight"),
    SiteKind.EMBEDDING: (".lora_embedding_A", ".lora_embedding_B"),
}
_KEYS_SHOWN: Final = 4
_CHANGED_BASE: Final = (
    "it assumes a changed base model; convert it where it was trained: "
    "save_pretrained(DIR, path_initial_model_for_weight_conversion=INITIAL_ADAPTER)"
)
#: initialisations that leave the base as it is, so that nothing is left of them in what is served
_PLAIN_INITS: Final = (True, False, "gaussian", "eva", "orthogonal", "mica")
#: of peft 0.21's LoraConfig (tuners/lora/config.py)
LORA_KEYS: Final[KeyRules] = MappingProxyType(
    {
        **COMMON_KEYS,
        "r": served(),
        "lora_alpha": served(),
        "use_rslora": served(is_bool),
        "target_modules": served(),
        "exclude_modules": served(),
        "layers_to_transform": served(),
        "layers_pattern": served(),
        "rank_pattern": served(is_object),
        "alpha_pattern": served(is_object),
        "lora_dropout": harmless(is_number),
        "runtime_config": harmless(is_object),
        # read only where another key, refused below, asks for it
        "megatron_core": harmless(is_text),
        "loftq_config": harmless(is_object),
        "eva_config": harmless(is_object),
        "corda_config": harmless(is_object),
        "lora_ga_config": harmless(is_object),
        "qalora_group_size": harmless(is_number),
        "init_lora_weights": refused(is_bool_or_text, *_PLAIN_INITS, hint=_CHANGED_BASE),
        "bias": refused(is_text, "none"),
        "fan_in_fan_out": refused(is_bool, False),
        "use_dora": refused(is_bool, False),
        "use_qalora": refused(is_bool, False),
        "lora_bias": refused(is_bool, False),
        "ensure_weight_tying": served(is_bool),
        "modules_to_save": served(is_list),
        "trainable_token_indices": served(is_list_or_object),
        "alora_invocation_tokens": refused(is_list, None, []),
        "layer_replication": refused(is_list, None, []),
        "target_parameters": refused(is_list, None, []),
        "megatron_config": refused(is_object, None),
        "velora_config": refused(is_object, None),
        "monteclora_config": refused(is_object, None),
        "use_bdlora": refused(is_object, None),
        "arrow_config": refused(is_object, None),
        "kasa_config": refused(is_object, None),
    }
)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the config says of every module."""

    rule: TargetRule
    targets: Targets
    ranks: PerModule[int]
    alphas: PerModule[float]

    @staticmethod
    def of(config: AdapterConfig) -> _Plan:
        found = ConfigReader(config)
        rule = found.target_rule()
        targets = Targets(rule)
        ranks = targets.per_module("rank_pattern", found.rank_pattern(), found.rank("r", 8))
        alphas = targets.per_module("alpha_pattern", found.alpha_pattern(), found.alpha("lora_alpha", 8))
        return _Plan(rule, targets, ranks, alphas)


@dataclass(frozen=True, slots=True)
class _Landed:
    """The adapter's tensors by site."""

    a: dict[str, torch.Tensor] = field(default_factory=dict)
    b: dict[str, torch.Tensor] = field(default_factory=dict)

    def place(self, key: str, tensor: torch.Tensor, sites: Mapping[str, Site]) -> bool:
        """Put a tensor where its name says; False when it is none of these."""
        rest = key
        for kind, (suffix_a, suffix_b) in _SUFFIXES.items():
            for suffix, place in ((suffix_a, self.a), (suffix_b, self.b)):
                site = sites.get(rest.removesuffix(suffix)) if rest.endswith(suffix) else None
                if site is not None and site.kind is kind:
                    place[site.name] = tensor
                    return True
        return False


@dataclass(frozen=True, slots=True)
class LoraKind:
    """LoRA (``use_rslora`` false) or rsLoRA (true)."""

    name: str
    use_rslora: bool

    def matches(self, config: AdapterConfig) -> bool:
        return config.peft_type == "LORA" and config.flag("use_rslora") is self.use_rslora

    @property
    def keys(self) -> KeyRules:
        return LORA_KEYS

    def lower(self, files: AdapterFiles, base: BaseView) -> Lowered:
        """See ``AdapterKind.lower``."""
        plan, where = _Plan.of(files.config), files.tensors.where
        landed = _land(files.tensors, base)
        targeted = plan.targets.select(base.of(SiteKind.LINEAR, SiteKind.EMBEDDING))
        if not targeted:
            raise Mismatch(
                f"{plan.rule.where}: target_modules {plan.rule.shown()} matches none of the model's sites; "
                f"the model has {base.modules()}"
            )
        _check_landing(targeted, landed, where)
        sites = [site for site in base.sites if site.name in targeted]
        deltas = {site.name: self._delta(site, landed, plan, where, base) for site in sites}
        return Lowered(deltas)

    def _delta(self, site: Site, landed: _Landed, plan: _Plan, where: str, base: BaseView) -> SiteDelta:
        rank, alpha = plan.ranks.of(site.name), plan.alphas.of(site.name)
        a = _checked(landed.a[site.name], site, "A", (rank, site.in_features), where)
        b = _checked(landed.b[site.name], site, "B", (site.out_features, rank), where)
        scale = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
        delta = LowRank(a.to(base.dtype), b.to(base.dtype), scale)
        # rounding to a narrower dtype, or the scale folded into B, may leave its range
        largest = max(_largest(delta.a), _largest(delta.b), _largest(delta.b) * scale)
        if not largest <= torch.finfo(base.dtype).max:
            raise InvalidAdapter(
                f"{where}: the factors of {site.name!r} (scale {scale:g}) leave the range of the base's {base.dtype}"
            )
        return SiteDelta(delta)


def _land(bag: TensorBag, base: BaseView) -> _Landed:
    """The kind's tensors, by site. Those that land on no site stay in the bag."""
    sites = base.by_name()
    landed = _Landed()
    for name in bag:
        tensor = bag.get(name)
        if tensor is not None and landed.place(name, tensor, sites):
            bag.take(name)
    return landed


def _check_landing(targeted: set[str], landed: _Landed, where: str) -> None:
    """Config and tensors must speak of the same sites, and every A has its B."""
    adapted = {*landed.a, *landed.b}
    missing, extra = sorted(targeted - adapted), sorted(adapted - targeted)
    if missing:
        raise Mismatch(
            f"{where}: only part of the adapter lands: of {len(targeted)} sites that target_modules selects, "
            f"{len(missing)} have no tensors: {_some(missing)}"
        )
    if extra:
        raise Mismatch(
            f"{where}: {len(extra)} sites have tensors but are not selected by target_modules: {_some(extra)}"
        )
    for part, one, other in (("A", landed.a, landed.b), ("B", landed.b, landed.a)):
        lonely = sorted(other.keys() - one.keys())
        if lonely:
            raise InvalidAdapter(f"{where}: sites without lora_{part}, which comes in a pair: {_some(lonely)}")


def _checked(tensor: torch.Tensor, site: Site, part: str, expected: tuple[int, int], where: str) -> torch.Tensor:
    shape = tuple(tensor.shape)
    if shape == expected:
        return tensor
    rank_axis = 0 if part == "A" else 1
    message = f"{where}: lora_{part} of {site.name!r} has shape {list(shape)}, expected {list(expected)}"
    if len(shape) == 2 and shape[1 - rank_axis] == expected[1 - rank_axis]:
        raise InvalidAdapter(
            f"{message}: rank {shape[rank_axis]}, where adapter_config.json says {expected[rank_axis]}"
        )
    raise Mismatch(f"{message}: it was made for another base model")


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().amax())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _KEYS_SHOWN} more" if len(names) > _KEYS_SHOWN else ""
    return ", ".join(names[:_KEYS_SHOWN]) + more
