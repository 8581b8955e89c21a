"""Which kinds there are: those of ``KINDS``, and those that other distributions bring. Found once, at start.

A distribution brings kinds by entry points of the group ``loraplex.adapter_kinds``: the entry point's name is the
``peft_type`` that the kind's configs carry, which may be new, and its object is the kind, ready to be asked.
docs/KINDS.md shows one. Installed kinds are asked after the built-in ones, and only about their own peft_type.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from loraplex.adapters.kinds import KINDS
from loraplex.adapters.kinds.base import AdapterKind
from loraplex.adapters.kinds.refusals import REASONS
from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.keys import COMMON_KEYS, KeyRule
from loraplex.errors import InvalidConfig, UnsupportedFeature

log = logging.getLogger("loraplex.adapters")

GROUP: Final = "loraplex.adapter_kinds"


@dataclass(frozen=True, slots=True)
class InstalledKind:
    """A kind that another distribution brought. ``source`` names that, for people: ``example-kinds 1.0``."""

    peft_type: str
    kind: AdapterKind
    source: str


@dataclass(frozen=True, slots=True)
class KindRegistry:
    """Every kind a server has. Unchanging: what is installed later counts from the next start."""

    built_in: tuple[AdapterKind, ...] = KINDS
    installed: tuple[InstalledKind, ...] = ()

    @property
    def also_known(self) -> frozenset[str]:
        """The peft_types of installed kinds, which a config may carry beside PEFT's own."""
        return frozenset(each.peft_type for each in self.installed)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all kinds, in the order they are asked."""
        return tuple(kind.name for kind in (*self.built_in, *(each.kind for each in self.installed)))

    def of(self, config: AdapterConfig) -> AdapterKind:
        """The first kind that serves ``config``. Raises UnsupportedFeature: none does; names the peft_type, and why."""
        asked = (each.kind for each in self.installed if each.peft_type == config.peft_type)
        for kind in (*self.built_in, *asked):
            if kind.matches(config):
                return kind
        reason = REASONS.get(config.peft_type, "no kind takes such a config")
        raise UnsupportedFeature(
            f"{config.where}: peft_type={config.peft_type} is not served: {reason} (served are "
            f"{', '.join(self.names)})",
            field="peft_type",
        )


def find_kinds() -> KindRegistry:
    """The built-in kinds and those of the installed distributions, each checked; says in the log what it found.

    Raises InvalidConfig: one that cannot be loaded, is no kind, or has another's name; names its distribution.
    """
    found = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    installed: list[InstalledKind] = []
    taken = {kind.name: "Loraplex itself" for kind in KINDS}
    for point in found:
        each = _loaded(point)
        if (owner := taken.get(each.kind.name)) is not None:
            raise _broken(each.source, point, f"its kind's name {each.kind.name!r} is taken by {owner}")
        taken[each.kind.name] = each.source
        installed.append(each)
        log.info("adapter kind %s for peft_type %s, of %s", each.kind.name, each.peft_type, each.source)
    return KindRegistry(installed=tuple(installed))


def _loaded(point: importlib.metadata.EntryPoint) -> InstalledKind:
    dist = point.dist
    source = "an unknown distribution" if dist is None else f"{dist.metadata['Name']} {dist.version}"
    try:
        kind = point.load()
    except Exception as error:  # other people's code, run at import, may raise anything
        raise _broken(source, point, f"it cannot be loaded: {type(error).__name__}: {error}") from error
    complaint = _complaint(kind, point.name)
    if complaint:
        raise _broken(source, point, complaint)
    return InstalledKind(point.name, kind, source)


def _complaint(kind: object, peft_type: str) -> str:
    """What is wrong with an object that says it is a kind; empty: nothing."""
    if not peft_type or not peft_type.replace("_", "").isalnum() or peft_type != peft_type.upper():
        return f"the entry point's name {peft_type!r} is no peft_type, such as SCALED_OUTPUT"
    if isinstance(kind, type) or not isinstance(kind, AdapterKind):
        return f"{kind!r} is no AdapterKind: an object with name, keys, matches and lower"
    if type(kind.name) is not str or not kind.name.isidentifier() or kind.name != kind.name.lower():
        return f"its kind's name is {kind.name!r}; expected one such as 'scaled_output'"
    return _complaint_of_keys(kind.keys)


def _complaint_of_keys(keys: object) -> str:
    if not isinstance(keys, Mapping) or not _are_rules(keys.items()):
        return "its kind's keys are not a KeyRule for each key of a config"
    missing = sorted(COMMON_KEYS.keys() - keys.keys())
    return f"its kind's keys lack {', '.join(missing)}, which every config has (COMMON_KEYS)" if missing else ""


def _are_rules(items: Iterable[tuple[object, object]]) -> bool:
    return all(isinstance(key, str) and isinstance(rule, KeyRule) for key, rule in items)


def _broken(source: str, point: importlib.metadata.EntryPoint, complaint: str) -> InvalidConfig:
    return InvalidConfig(f"entry point {point.name!r} ({point.value}) of {source} in group {GROUP}: {complaint}")
