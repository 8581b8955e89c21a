"""Which sites a config speaks of: PEFT's matching rules over the site list.

Sources: peft 0.21 tuners/tuners_utils.py ``check_target_module_exists`` and ``_maybe_include_all_linear_layers``,
utils/other.py ``get_pattern_key``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from loraplex.adapters.reading.pattern import Pattern, PatternError, Steps
from loraplex.adapters.reading.phrases import some
from loraplex.errors import InvalidAdapter, Mismatch
from loraplex.models.sites import Site, SiteKind

T = TypeVar("T")

#: PEFT's word for every linear module but the output head
ALL_LINEAR: Final = "all-linear"
#: node visits that all patterns of one config may take together: a second or two
_MAX_STEPS: Final = 1_000_000
_META: Final = frozenset("\\^$*+?{}[]|()")
_SHOWN_CHARS: Final = 200


@dataclass(frozen=True, slots=True)
class TargetRule:
    """The keys of a config that say which modules it adapts. Names are tuples, a pattern is one string."""

    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    where: str
    #: patterns of modules that are saved as a whole, and so are never adapted
    modules_to_save: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises InvalidAdapter: no target, or a combination that PEFT's configs refuse."""
        if not self.target_modules:
            raise InvalidAdapter(
                f"{self.where}: target_modules is missing or empty; name the adapted modules", field="target_modules"
            )
        by_pattern = type(self.target_modules) is str
        for key, value in (("layers_to_transform", self.layers_to_transform), ("layers_pattern", self.layers_pattern)):
            if by_pattern and value:
                raise InvalidAdapter(f"{self.where}: {key} cannot be used when target_modules is a string", field=key)
        if self.layers_pattern and not self.layers_to_transform:
            raise InvalidAdapter(f"{self.where}: layers_pattern needs layers_to_transform", field="layers_pattern")

    def matches_none(self, modules: str) -> Mismatch:
        """The error where ``target_modules`` selects nothing. ``modules``: what the model has."""
        return Mismatch(
            f"{self.where}: target_modules {self.shown()} matches none of the model's sites; the model has {modules}",
            field="target_modules",
        )

    def shown(self) -> str:
        """``target_modules`` for a message: short, whatever it is."""
        value = self.target_modules
        text = repr(value) if isinstance(value, str) else some([repr(name) for name in value])
        return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


class Targets:
    """A config's target rule, ready to be asked; its patterns and those of ``per_module`` share one budget of time."""

    def __init__(self, rule: TargetRule) -> None:
        """Raises InvalidAdapter: a pattern that is malformed or not read."""
        self._rule = rule
        self._steps = Steps(_MAX_STEPS)
        self._target = self._whole("target_modules", rule.target_modules)
        self._exclude = self._whole("exclude_modules", rule.exclude_modules)
        # PEFT reads these names as patterns
        self._saved = {
            name: self._compile("modules_to_save", rf"(^|.*\.){name}($|\..*)")
            for name in rule.modules_to_save
            if not _META.isdisjoint(name)
        }

    def select(self, sites: Iterable[Site]) -> set[str]:
        """Names of the sites that the config adapts. Raises InvalidAdapter: the patterns take too long."""
        return {site.name for site in sites if self._selects(site)}

    def is_saved(self, module: str) -> bool:
        """Whether ``modules_to_save`` names this module, or one that it lies in, so that no adapter is put there."""
        parts = f".{module}."
        return any(
            self._matches(self._saved[name], module) if name in self._saved else f".{name}." in parts
            for name in self._rule.modules_to_save
        )

    def names_module(self, module: str) -> bool:
        """Whether ``target_modules`` speaks of modules of this name wherever they lie: ``lm_head``."""
        target = self._rule.target_modules
        if isinstance(target, str):
            return self._matches(self._target, module)
        return any(name.rsplit(".", 1)[-1] == module for name in target)

    def saves_module(self, module: str) -> bool:
        """Whether ``modules_to_save`` holds a name that ends in this one."""
        return any(name.rsplit(".", 1)[-1] == module for name in self._rule.modules_to_save)

    def per_module(self, key: str, patterns: Mapping[str, T], default: T) -> PerModule[T]:
        """A value per module, of a key such as ``rank_pattern``. Raises InvalidAdapter: a malformed pattern."""
        compiled = {
            pattern: self._inside_brackets(key, pattern) for pattern in patterns if not _META.isdisjoint(pattern)
        }
        return PerModule(patterns, default, compiled, self._rule.where)

    def matcher(self, key: str, pattern: str) -> Callable[[str], bool]:
        """Whether the whole of a module's name matches ``pattern``, of a key such as ``feedforward_modules``.

        Raises InvalidAdapter, here and when asked: it is malformed, or takes too long.
        """
        compiled = self._compile(key, pattern)

        def matches(name: str) -> bool:
            try:
                return compiled.fullmatch(name)
            except PatternError as error:
                raise InvalidAdapter(f"{self._rule.where}: {error}") from None

        return matches

    def _selects(self, site: Site) -> bool:
        name, exclude, target = site.name, self._rule.exclude_modules, self._rule.target_modules
        if site.kind is SiteKind.VECTOR:  # a parameter is no module
            return False
        if self._matches(self._exclude, name):
            return False
        if isinstance(exclude, tuple) and _ends_with_any(name, exclude):
            return False
        if self.is_saved(name):
            return False
        if isinstance(target, str):
            if target.lower() == ALL_LINEAR:
                return site.kind is SiteKind.LINEAR and not site.is_head
            return self._matches(self._target, name)
        if name in target:
            return True
        return _ends_with_any(name, target) and self._in_layers(name)

    def _in_layers(self, name: str) -> bool:
        wanted = self._rule.layers_to_transform
        if not wanted:
            return True
        patterns = [re.escape(pattern) for pattern in self._rule.layers_pattern]
        rules = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for rule in rules if (match := re.match(rule, name))), None)
        return found is not None and int(found[1]) in wanted

    def _matches(self, pattern: Pattern | None, module: str) -> bool:
        try:
            return pattern is not None and pattern.fullmatch(module)
        except PatternError as error:
            raise InvalidAdapter(f"{self._rule.where}: {error}") from None

    def _whole(self, key: str, value: tuple[str, ...] | str) -> Pattern | None:
        if type(value) is not str or not value or value.lower() == ALL_LINEAR:
            return None
        return self._compile(key, value)

    def _inside_brackets(self, key: str, pattern: str) -> Pattern:
        """PEFT's ``re.match`` of a name: the same as all of it, unless the pattern closes the brackets that are put
        around it (``a)|(b``), which is refused."""
        self._compile(key, pattern)
        return self._compile(key, rf"(.*\.)?({pattern})$")

    def _compile(self, key: str, source: str) -> Pattern:
        try:
            return Pattern(source, self._steps)
        except PatternError as error:
            raise InvalidAdapter(f"{self._rule.where}: {key}: {error}", field=key) from None


@dataclass(frozen=True, slots=True)
class PerModule(Generic[T]):
    """A value per module by PEFT's rule: the first pattern that matches, else the default.

    Patterns with meta characters are compiled; plain names, of which there may be thousands, are compared directly.
    """

    values: Mapping[str, T]
    default: T
    compiled: Mapping[str, Pattern]
    where: str

    def of(self, site: str) -> T:
        """The value of ``site``. Raises InvalidAdapter: the patterns take too long."""
        try:
            for pattern, value in self.values.items():
                known = self.compiled.get(pattern)
                if known.fullmatch(site) if known is not None else _ends_with_plain(site, pattern):
                    return value
        except PatternError as error:
            raise InvalidAdapter(f"{self.where}: {error}") from None
        # get_pattern_key falls back to the module's own name as the key
        return self.values.get(site, self.default)


def _ends_with_any(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _ends_with_plain(name: str, pattern: str) -> bool:
    """``re.match(rf"(.*\\.)?({pattern})$", name)`` for a pattern whose only meta character is the dot."""
    start = len(name) - len(pattern)
    if start < 0 or (start and name[start - 1] != "."):
        return False
    return all(want in (".", got) for want, got in zip(pattern, name[start:], strict=True))
