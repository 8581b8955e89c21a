"""How a step is captured on CUDA: the one file that knows ``torch.cuda.CUDAGraph``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

#: calls before a capture: the first compiles kernels, opens libraries and takes their workspaces, which a capture may
#: not; libraries that try several kernels have chosen one by the next
_WARM_UPS: Final = 2


@dataclass(frozen=True, slots=True)
class _Replay:
    """A captured step. ``step`` is not called again; it keeps what the graph reads alive."""

    graph: torch.cuda.CUDAGraph
    step: Callable[[], None]

    def __call__(self) -> None:
        self.graph.replay()


class CudaCapture:
    """Captures on a stream of its own, all graphs out of one memory pool, because only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._free_bytes = torch.cuda.mem_get_info(device)[0]

    @property
    def nbytes(self) -> int:
        """Device memory taken since this was made, by captures and whatever else."""
        return max(0, self._free_bytes - torch.cuda.mem_get_info(self._device)[0])

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Warm up, then capture. Raises RuntimeError (torch.OutOfMemoryError among them) as torch does."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                step()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # another thread may read the base's weights for an adapter it loads: that is no part of this capture
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step()
        return _Replay(graph, step)
