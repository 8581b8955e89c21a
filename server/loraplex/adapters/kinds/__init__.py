"""The seam of adapter kinds: a new kind is one file here and one line in ``KINDS``; ``registry`` asks them."""

from __future__ import annotations

from typing import Final

from loraplex.adapters.kinds.adalora import AdaloraKind
from loraplex.adapters.kinds.alora import AloraKind
from loraplex.adapters.kinds.base import AdapterKind
from loraplex.adapters.kinds.bdlora import BdLoraKind
from loraplex.adapters.kinds.dora import DoraKind
from loraplex.adapters.kinds.ia3 import Ia3Kind
from loraplex.adapters.kinds.ln_tuning import LnTuningKind
from loraplex.adapters.kinds.loha import LohaKind
from loraplex.adapters.kinds.lokr import LokrKind
from loraplex.adapters.kinds.lora import LoraKind
from loraplex.adapters.kinds.trainable_tokens import TrainableTokensKind
from loraplex.adapters.kinds.vera import VeraKind

#: asked in this order; the first that matches lowers the adapter
KINDS: Final[tuple[AdapterKind, ...]] = (
    LoraKind("lora", use_rslora=False),
    LoraKind("rslora", use_rslora=True),
    DoraKind(),
    BdLoraKind(),
    AloraKind(),
    TrainableTokensKind(),
    AdaloraKind(),
    VeraKind(),
    LohaKind(),
    LokrKind(),
    Ia3Kind(),
    LnTuningKind(),
)
