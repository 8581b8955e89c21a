"""What the card itself can do: copies, products, uploads, and what a node of a captured graph costs.

Everything else is judged by these, measured in the same run, not by a data sheet.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch

from bench.gpu_check.section import Row, Section, Setting
from bench.ops.timing import stopwatch_for

WARM_UP = 2
REPEATS = 20
NODES = (64, 512)


def run(setting: Setting) -> Iterator[Row]:
    """Device copy, bf16 product, pinned upload, and the slope of a graph's time over its number of nodes."""
    dry, device = setting.dry, setting.device
    size = (1 << 12) if dry else (1 << 30)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = _median_s(setting, lambda: target.copy_(source))
    yield {"what": "device copy, read + written", "value": 2 * source.nbytes / seconds / 1e9, "unit": "GB/s"}

    side = 16 if dry else 8192
    left, right = (torch.randn(side, side, device=device, dtype=setting.dtype) for _ in range(2))
    seconds = _median_s(setting, lambda: left @ right)
    yield {"what": f"product of {side}, {setting.dtype}", "value": 2 * side**3 / seconds / 1e12, "unit": "TFLOP/s"}

    for mib in (1,) if dry else (4, 84, 336):
        host = torch.empty(mib << 20, dtype=torch.uint8, pin_memory=not dry)
        there = torch.empty_like(host, device=device)
        seconds = _median_s(setting, lambda h=host, t=there: t.copy_(h, non_blocking=True))  # type: ignore[misc]
        yield {"what": f"pinned upload of {mib} MiB", "value": host.nbytes / seconds / 1e9, "unit": "GB/s"}

    if dry:
        return
    few, many = (_graph_s(count, device) for count in NODES)
    yield {"what": "one more node in a graph", "value": (many - few) / (NODES[1] - NODES[0]) * 1e6, "unit": "us"}


def _median_s(setting: Setting, work: Callable[[], object]) -> float:
    stopwatch = stopwatch_for(setting.device)
    times = [stopwatch.elapsed_s(work) for _ in range(WARM_UP + (1 if setting.dry else REPEATS))]
    return statistics.median(times[WARM_UP:])


def _graph_s(nodes: int, device: torch.device) -> float:
    """Median seconds of replaying ``nodes`` kernels that each touch one block of memory."""
    x = torch.zeros(1024, device=device)
    x.add_(1)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(nodes):
            x.add_(1)
    stopwatch = stopwatch_for(device)
    return statistics.median(stopwatch.elapsed_s(graph.replay) for _ in range(REPEATS))


SECTION = Section("ceilings", run, 15.0)
