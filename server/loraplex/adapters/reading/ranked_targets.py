"""Which modules a config adapts, each with its rank and its alpha: read once for all kinds that have both."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.keys import ConfigReader, KeyRules, is_object, served
from loraplex.adapters.reading.targets import PerModule, TargetRule, Targets

#: what ``RankedTargets`` reads, for a kind's table; each kind has a key of its own for alpha
RANKED_TARGET_KEYS: Final[KeyRules] = MappingProxyType(
    {
        "r": served(),
        "target_modules": served(),
        "exclude_modules": served(),
        "layers_to_transform": served(),
        "layers_pattern": served(),
        "rank_pattern": served(is_object),
        "alpha_pattern": served(is_object),
    }
)


@dataclass(frozen=True, slots=True)
class RankedTargets:
    """``targets`` is ``rule`` ready to be asked; ``ranks`` and ``alphas`` are of every module that it may select."""

    rule: TargetRule
    targets: Targets
    ranks: PerModule[int]
    alphas: PerModule[float]

    @property
    def where(self) -> str:
        """The config's file, for messages."""
        return self.rule.where

    @staticmethod
    def of(config: AdapterConfig, alpha_key: str) -> RankedTargets:
        """Raises InvalidAdapter, and UnsupportedFeature for a ``layers_pattern`` that is no plain name."""
        found = ConfigReader(config)
        rule = found.target_rule()
        targets = Targets(rule)
        return RankedTargets(
            rule=rule,
            targets=targets,
            ranks=targets.per_module("rank_pattern", found.rank_pattern(), found.rank("r", 8)),
            alphas=targets.per_module("alpha_pattern", found.alpha_pattern(), found.alpha(alpha_key, 8)),
        )
