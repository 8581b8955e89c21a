"""What the counted bytes and launches are divided by. Times made from these are computed, never measured."""

from __future__ import annotations

from dataclasses import dataclass

from bench.limits.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class Hardware:
    """Rates of one accelerator."""

    name: str
    dram_bytes_per_s: float
    l2_bytes_per_s: float
    node_s: float
    """What one more node of a captured graph costs before it does any work."""


#: 4.3 TB/s of copy and 2 us a captured node are figures taken on one such card, not by this project. The second-level
#: cache's rate is an assumption: what is published for this generation lies around it.
H200 = Hardware(name="H200", dram_bytes_per_s=4.3e12, l2_bytes_per_s=5.5e12, node_s=2e-6)


@dataclass(frozen=True, slots=True)
class BaseFormat:
    """How the base's linear layers are stored. The output head stays in 16 bits."""

    name: str
    linear_bits: float

    def step_bytes(self, model: ModelShape) -> float:
        """What a decode step reads of the base, whatever the batch: every weight once. The cache is left out."""
        return model.linear_weights * self.linear_bits / 8 + model.head_weights * 2

    def step_s(self, model: ModelShape, hardware: Hardware) -> float:
        """The least time of a base step, weights over bandwidth. A real one is longer, its overheads in % smaller."""
        return self.step_bytes(model) / hardware.dram_bytes_per_s


BF16 = BaseFormat("bf16", 16)
#: four-bit weights with a 16-bit scale for every 64 of them
FOUR_BIT = BaseFormat("4.25-bit", 4.25)
BASE_FORMATS = (BF16, FOUR_BIT)
