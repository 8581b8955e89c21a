"""Which sites a config speaks of: PEFT's matching rules over the site list.

Sources: peft 0.21 tuners/tuners_utils.py ``check_target_module_exists`` and ``_maybe_include_all_linear_layers``,
utils/other.py ``get_pattern_key``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, TypeVar

from loraplex.adapters.pattern import Pattern, PatternError, Steps
from loraplex.adapters.peft_config import LoraConfig
from loraplex.errors import InvalidAdapter
from loraplex.models.sites import Site, SiteKind

T = TypeVar("T")

#: PEFT's word for every linear module but the output head
ALL_LINEAR: Final = "all-linear"
_OUTPUT_HEAD: Final = "lm_head"
#: node visits that all patterns of one config may take together: a second or two
_MAX_STEPS: Final = 1_000_000
_META: Final = frozenset("\\^$*+?{}[]|()")


class Targets:
    """A LoRA config's target rule and its per-module ranks and alphas."""

    def __init__(self, config: LoraConfig) -> None:
        """Raises InvalidAdapter: a pattern that is malformed or not read."""
        self._config = config
        self._steps = Steps(_MAX_STEPS)
        self._target = self._whole("target_modules", config.target_modules)
        self._exclude = self._whole("exclude_modules", config.exclude_modules)
        self._ranks = self._suffixes("rank_pattern", config.rank_pattern)
        self._alphas = self._suffixes("alpha_pattern", config.alpha_pattern)

    def select(self, sites: Iterable[Site]) -> set[str]:
        """Names of the sites that the config adapts. Raises InvalidAdapter: the patterns take too long."""
        try:
            return {site.name for site in sites if self._selects(site)}
        except PatternError as error:
            raise InvalidAdapter(f"{self._config.where}: {error}") from None

    def rank(self, site: str) -> int:
        """The rank PEFT gives ``site``. Raises InvalidAdapter: the patterns take too long."""
        return self._lookup(self._ranks, self._config.rank_pattern, site, self._config.r)

    def alpha(self, site: str) -> float:
        """The alpha PEFT gives ``site``. Raises InvalidAdapter: the patterns take too long."""
        return self._lookup(self._alphas, self._config.alpha_pattern, site, self._config.lora_alpha)

    def _selects(self, site: Site) -> bool:
        name, exclude, target = site.name, self._config.exclude_modules, self._config.target_modules
        if self._exclude is not None and self._exclude.fullmatch(name):
            return False
        if isinstance(exclude, tuple) and _ends_with_any(name, exclude):
            return False
        if isinstance(target, str):
            if target.lower() == ALL_LINEAR:
                return site.kind is SiteKind.LINEAR and site.module != _OUTPUT_HEAD
            return self._target is not None and self._target.fullmatch(name)
        if name in target:
            return True
        return _ends_with_any(name, target) and self._in_layers(name)

    def _in_layers(self, name: str) -> bool:
        wanted = self._config.layers_to_transform
        if not wanted:
            return True
        patterns = [re.escape(pattern) for pattern in self._config.layers_pattern]
        rules = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for rule in rules if (match := re.match(rule, name))), None)
        return found is not None and int(found[1]) in wanted

    def _whole(self, key: str, value: tuple[str, ...] | str) -> Pattern | None:
        if type(value) is not str or not value or value.lower() == ALL_LINEAR:
            return None
        return self._compile(key, value)

    def _suffixes(self, key: str, patterns: Mapping[str, object]) -> dict[str, Pattern]:
        """Patterns with meta characters; plain names, of which there may be thousands, are compared directly."""
        return {
            pattern: self._compile(key, rf"(.*\.)?({pattern})$")
            for pattern in patterns
            if not _META.isdisjoint(pattern)
        }

    def _compile(self, key: str, source: str) -> Pattern:
        try:
            return Pattern(source, self._steps)
        except PatternError as error:
            raise InvalidAdapter(f"{self._config.where}: {key}: {error}") from None

    def _lookup(self, compiled: Mapping[str, Pattern], values: Mapping[str, T], site: str, default: T) -> T:
        try:
            for pattern, value in values.items():
                known = compiled.get(pattern)
                if known.fullmatch(site) if known is not None else _ends_with_plain(site, pattern):
                    return value
        except PatternError as error:
            raise InvalidAdapter(f"{self._config.where}: {error}") from None
        # get_pattern_key falls back to the module's own name as the key
        return values.get(site, default)


def _ends_with_any(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _ends_with_plain(name: str, pattern: str) -> bool:
    """``re.match(rf"(.*\\.)?({pattern})$", name)`` for a pattern whose only meta character is the dot."""
    start = len(name) - len(pattern)
    if start < 0 or (start and name[start - 1] != "."):
        return False
    return all(want in (".", got) for want, got in zip(pattern, name[start:], strict=True))
