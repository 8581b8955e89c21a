"""The sections in the order in which they run: what the rest depends on first, then what says most."""

from __future__ import annotations

from typing import Final

import torch

from bench.gpu_check import ceilings, forms, gpu_tests, kinds, layer, ops, quant, ranks, retention, states
from bench.gpu_check.section import Section

SECTIONS: Final[tuple[Section, ...]] = (
    ceilings.SECTION,
    gpu_tests.SECTION,
    retention.SECTION,
    kinds.SECTION,
    quant.SECTION,
    ranks.SECTION,
    layer.SECTION,
    ops.SECTION,
    states.SECTION,
)
#: asked for by name alone
MORE: Final[tuple[Section, ...]] = (forms.SECTION,)


def device_of(dry: bool) -> torch.device:
    """Where a check runs."""
    return torch.device("cpu" if dry else "cuda")
