"""What a kind, and every part that all kinds share, is given of one adapter."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.tensors import TensorBag


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter as its directory holds it. The config's keys have been held against the kind's rules.

    ``max_bytes``: what the lowered adapter may take. It may be far more than its file, for kinds that save less than
    they compute with.
    """

    config: AdapterConfig
    tensors: TensorBag
    max_bytes: int
