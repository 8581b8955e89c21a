"""How a step is captured where the check runs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loraplex.engine.cuda_graphs import CudaCapture
from loraplex.engine.graphs import GraphCapture


class CallAgain:
    """For a dry run: what was captured is called again. Everything that a graph reads still comes from static plans."""

    nbytes = 0

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step


def capture_for(device: torch.device) -> GraphCapture:
    """Graphs on a GPU; calls elsewhere."""
    return CudaCapture(device) if device.type == "cuda" else CallAgain()
