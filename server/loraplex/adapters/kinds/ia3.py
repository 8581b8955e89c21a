"""IA3: one learned vector a layer, which multiplies the layer's output, or in feed-forward modules its input.

Sources: arXiv:2205.05638; peft 0.21 tuners/ia3/layer.py ``Linear.forward`` (the bias is multiplied too) and
tuners/ia3/model.py ``_check_target_module_feedforward`` (names match by their end, not by whole parts of a name).
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Final

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import SiteDelta
from loraplex.adapters.kinds.base import Lowered
from loraplex.adapters.reading.adapter_files import AdapterFiles
from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.keys import (
    COMMON_KEYS,
    ConfigReader,
    KeyRules,
    harmless,
    is_bool,
    served,
)
from loraplex.adapters.reading.site_tensors import SiteTensors, take_site_tensors, targeted_linears
from loraplex.adapters.reading.targets import Targets
from loraplex.errors import InvalidAdapter

_PART: Final = "ia3_l"
#: of peft 0.21's IA3Config (tuners/ia3/config.py)
IA3_KEYS: Final[KeyRules] = MappingProxyType(
    {
        **COMMON_KEYS,
        "target_modules": served(),
        "exclude_modules": served(),
        "feedforward_modules": served(),
        "modules_to_save": served(),
        # how a layer stores its weight, which PEFT finds out by itself, and which a vector does not ask
        "fan_in_fan_out": harmless(is_bool),
        "init_ia3_weights": harmless(is_bool),
    }
)


class Ia3Kind:
    """Vectors ``[out, 1]`` become ``out_scale``; those of feed-forward modules, ``[1, in]``, become ``in_scale``."""

    name: Final = "ia3"
    keys: Final = IA3_KEYS

    def matches(self, config: AdapterConfig) -> bool:
        return config.peft_type == "IA3"

    def lower(self, files: AdapterFiles, base: BaseView) -> Lowered:
        """See ``AdapterKind.lower``."""
        rule = ConfigReader(files.config).target_rule()
        targets = Targets(rule)
        is_feedforward = _feedforward(files.config, targets)
        found = take_site_tensors(files.tensors, targeted_linears(rule, targets, base), (_PART,))
        return Lowered({name: _delta(tensors, is_feedforward(name)) for name, tensors in found.items()})


def _delta(tensors: SiteTensors, is_feedforward: bool) -> SiteDelta:
    site = tensors.site
    if is_feedforward:
        return SiteDelta(in_scale=tensors.take(_PART, (1, site.in_features)).flatten())
    return SiteDelta(out_scale=tensors.take(_PART, (site.out_features, 1)).flatten())


def _feedforward(config: AdapterConfig, targets: Targets) -> Callable[[str], bool]:
    """Whether a module is a feed-forward one, by its name."""
    value = ConfigReader(config).names_or_pattern("feedforward_modules")
    if type(value) is str:
        return targets.matcher("feedforward_modules", value)
    if config.values.get("feedforward_modules") is None:
        raise InvalidAdapter(
            f"{config.where}: feedforward_modules is missing; name the modules whose input is scaled ([]: none), as "
            f"PEFT does when it saves",
            field="feedforward_modules",
        )
    targeted = ConfigReader(config).names_or_pattern("target_modules")
    if type(targeted) is tuple and not set(value) <= set(targeted):
        raise InvalidAdapter(
            f"{config.where}: feedforward_modules names modules that target_modules does not",
            field="feedforward_modules",
        )
    ends = tuple(value)
    return lambda name: name.endswith(ends)
