"""Whole decode steps: the designs' launches over all layers, and the time that follows from the hardware's rates."""

from __future__ import annotations

from dataclasses import dataclass

from bench.limits.batch import Batch
from bench.limits.designs import LEAST, Design, Traffic
from bench.limits.hardware import BaseFormat, Hardware
from bench.limits.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class StepCost:
    """The adapters' part of one decode step under one design. Times are computed."""

    design: str
    launches: int
    dram_bytes: int
    l2_bytes: int
    launch_s: float
    bytes_s: float

    @property
    def total_s(self) -> float:
        return self.launch_s + self.bytes_s


def step_cost(design: Design, model: ModelShape, batch: Batch, hardware: Hardware) -> StepCost:
    """Count a step. Launches follow each other: each costs a node, then the slower of its two byte streams.

    The least has no launches: it is the floor under all designs.
    """
    nodes = [(node, model.num_layers) for layer in model.packed_layers for node in design.launches(layer, batch)] + [
        (node, 1) for node in design.per_step(batch)
    ]
    launches = 0 if design is LEAST else sum(count for _, count in nodes)
    return StepCost(
        design=design.name,
        launches=launches,
        dram_bytes=sum(count * node.dram_bytes for node, count in nodes),
        l2_bytes=sum(count * node.l2_bytes for node, count in nodes),
        launch_s=launches * hardware.node_s,
        bytes_s=sum(count * bytes_s(node, hardware) for node, count in nodes),
    )


def bytes_s(traffic: Traffic, hardware: Hardware) -> float:
    """Seconds of one launch's bytes: all of them pass the second-level cache, some come from device memory."""
    from_dram = traffic.dram_bytes / hardware.dram_bytes_per_s
    through_l2 = (traffic.dram_bytes + traffic.l2_bytes) / hardware.l2_bytes_per_s
    return max(from_dram, through_l2)


def overhead(cost: StepCost, base: BaseFormat, model: ModelShape, hardware: Hardware) -> float:
    """Adapter time over the base step's: 0.05 is five per cent."""
    return cost.total_s / base.step_s(model, hardware)


def retention(cost: StepCost, base: BaseFormat, model: ModelShape, hardware: Hardware) -> float:
    """Tokens/s with adapters over tokens/s without."""
    return 1 / (1 + overhead(cost, base, model, hardware))
