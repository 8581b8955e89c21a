"""What an adapter kind answers. Kinds lower adapters at load; nothing behind the loader hears their names.

What PEFT gives every kind is not a kind's business: saved modules, trained tokens and added vocabulary are lowered by
``adapters/saved/read.py`` for all of them, and tensors that nobody takes are refused by ``adapters/load.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import SiteDelta
from loraplex.adapters.reading.adapter_files import AdapterFiles
from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.keys import KeyRule


@dataclass(frozen=True, slots=True)
class Lowered:
    """A kind's answer. ``invocation_tokens``: see ``AdapterDelta``."""

    sites: dict[str, SiteDelta]
    invocation_tokens: tuple[int, ...] = ()


@runtime_checkable
class AdapterKind(Protocol):
    """One way of adapting a model, by its published name."""

    @property
    def name(self) -> str: ...

    @property
    def keys(self) -> Mapping[str, KeyRule]:
        """The rule of every key that this kind's configs may have, ``COMMON_KEYS`` among them."""
        ...

    def matches(self, config: AdapterConfig) -> bool:
        """Whether this kind serves such a config. Looks at the few keys that tell kinds apart."""
        ...

    def lower(self, files: AdapterFiles, base: BaseView) -> Lowered:
        """Every site the kind's own tensors touch, factors in the base's dtype; takes those tensors out of the bag.

        A linear site's bias, where PEFT saves it (``bias`` is ``all`` or of the kind's own), is part of this.

        Raises:
            InvalidAdapter: config or tensors are malformed; names file and key.
            UnsupportedFeature: a feature that is not served, by its name.
            Mismatch: a targeted site without tensors, or a shape that does not fit.
        """
        ...
