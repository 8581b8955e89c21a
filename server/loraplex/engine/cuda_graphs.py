"""How a step is captured on CUDA: the one file that knows ``torch.cuda.CUDAGraph``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

#: calls before a capture: the first compiles kernels, opens libraries and takes their workspaces, which a capture may
#: not; libraries that try several kernels have chosen one by the next. NCCL connects ranks when a sum first takes a way
#: that it has not taken yet, and which way depends on the sum's size: so before every capture, not before the first one
_WARM_UPS: Final = 2


@dataclass(frozen=True, slots=True)
class _Replay:
    """A captured step. ``step`` is not called again; it keeps what the graph reads alive."""

    graph: torch.cuda.CUDAGraph
    step: Callable[[], None]

    def __call__(self) -> None:
        self.graph.replay()


class CudaCapture:
    """Captures on a stream of its own, all graphs out of one memory pool, because only one of them runs at a time.

    Sums over ranks are captured as what they launch, so all ranks must capture and replay the same graphs in one order.
    torch watches the sums of warm-ups, and none that a graph replays: one that never ends is not seen here.
    """

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
        # another thread may read the base's weights for an adapter it loads, and NCCL's asks whether sums from before
        # have been made: neither is part of this capture, and in the stricter mode either would break it
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step()
        return _Replay(graph, step)
