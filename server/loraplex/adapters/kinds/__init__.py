"""The seam of adapter kinds: a new kind is one file here and one line in ``KINDS``."""

from __future__ import annotations

from typing import Final

from loraplex.adapters.config_file import AdapterConfig
from loraplex.adapters.kinds.alora import AloraKind
from loraplex.adapters.kinds.base import AdapterKind
from loraplex.adapters.kinds.bdlora import BdLoraKind
from loraplex.adapters.kinds.dora import DoraKind
from loraplex.adapters.kinds.lora import LoraKind
from loraplex.errors import UnsupportedFeature

#: asked in this order; the first that matches lowers the adapter
KINDS: Final[tuple[AdapterKind, ...]] = (
    LoraKind("lora", use_rslora=False),
    LoraKind("rslora", use_rslora=True),
    DoraKind(),
    BdLoraKind(),
    AloraKind(),
)


def kind_of(config: AdapterConfig) -> AdapterKind:
    """The kind that serves ``config``. Raises UnsupportedFeature: none does; names the peft_type."""
    for kind in KINDS:
        if kind.matches(config):
            return kind
    raise UnsupportedFeature(
        f"{config.where}: peft_type={config.peft_type} is not served (only {', '.join(kind.name for kind in KINDS)})",
        field="peft_type",
    )
