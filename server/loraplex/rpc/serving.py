"""What every service needs of the server it is part of."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.engine.handle import EngineHandle
from loraplex.metrics import Metrics
from loraplex.rpc.gate import Gate
from loraplex.text.adapter_text import AdapterTexts


@dataclass(frozen=True, slots=True)
class Serving:
    """The parts that services share."""

    engine: EngineHandle
    texts: AdapterTexts
    metrics: Metrics
    gate: Gate
    default_max_tokens: int
