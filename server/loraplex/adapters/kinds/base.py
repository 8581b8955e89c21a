"""What an adapter kind answers. Kinds compile at load; nothing behind the loader hears their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import SiteDelta
from loraplex.adapters.peft_config import AdapterConfig


class AdapterKind(Protocol):
    """One way of adapting a model, by its published name."""

    @property
    def name(self) -> str: ...

    def matches(self, config: AdapterConfig) -> bool:
        """Whether this kind serves such a config. Looks at the few keys that tell kinds apart; ``lower`` checks all."""
        ...

    def lower(
        self, config: AdapterConfig, tensors: Mapping[str, torch.Tensor], where: str, base: BaseView
    ) -> dict[str, SiteDelta]:
        """Every site the adapter touches, with factors in the base's dtype, in site order.

        ``tensors`` are finite, in their stored dtypes; ``where`` names their file in messages.

        Raises:
            InvalidAdapter: config or tensors are malformed; names file and key.
            UnsupportedFeature: a feature that is not served, by its name.
            Mismatch: a tensor that lands on no site, a targeted site without tensors, or a shape that does not fit.
        """
        ...
