"""Feed-forward blocks: gated with two matrices or with one that holds both, and plain."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from loraplex.layers.linear import Linear
from loraplex.layers.mlp import ACTIVATIONS, GatedMLP, PlainMLP
from loraplex.layers.step import LayerStep
from loraplex.models.mixers.base import BuiltMixer, HeldLinear
from loraplex.models.sites import Site, SiteKind
from loraplex.parallel.shard import Cut, Shard, Stretch

if TYPE_CHECKING:
    from loraplex.models.workbench import Workbench


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """``up`` names the matrices that the input is multiplied by: gate and up, or up alone where there is no gate, or
    one that holds gate and up (``packed``). ``name`` is the module's below its layer.

    ``scales``: constants of a family, of the gate before its activation and of the output. ``what``: the key in
    config.json that ``width`` stands under.
    """

    hidden_size: int
    width: int
    activation: str
    name: str = "mlp"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    packed: bool = False
    bias: bool = False
    scales: tuple[float, float] = (1.0, 1.0)
    what: str = "intermediate_size"

    @property
    def is_gated(self) -> bool:
        return self.packed or len(self.up) > 1

    def sites(self) -> tuple[Site, ...]:
        cut = Cut(Shard.COLUMN, self.width, self.what)
        packed = tuple(Stretch(self.width, self.width, name) for name in ("gate", "up"))
        stretches = packed if self.packed else ()
        out_features = 2 * self.width if self.packed else self.width
        ups = (
            Site(
                f"{self.name}.{up}",
                SiteKind.LINEAR,
                self.hidden_size,
                out_features,
                self.bias,
                replace(cut, stretches=stretches),
            )
            for up in self.up
        )
        down_cut = replace(cut, shard=Shard.ROW)
        down = Site(f"{self.name}.{self.down}", SiteKind.LINEAR, self.width, self.hidden_size, self.bias, down_cut)
        return (*ups, down)

    def build(self, bench: Workbench, layer: str) -> BuiltMixer:
        name = f"{layer}.{self.name}"
        up = bench.linear(*(f"{name}.{one}" for one in self.up))
        down = bench.linear(f"{name}.{self.down}")
        return BuiltMixer(_FeedForward(self._made(up, down)), (HeldLinear(up), HeldLinear(down)))

    def _made(self, up: Linear, down: Linear) -> GatedMLP | PlainMLP:
        activation = ACTIVATIONS[self.activation]
        return GatedMLP(up, down, activation, self.scales) if self.is_gated else PlainMLP(up, down, activation)


@dataclass(frozen=True, slots=True)
class _FeedForward:
    """A block that looks at no other row, as a mixer."""

    block: GatedMLP | PlainMLP

    def __call__(self, x: torch.Tensor, step: LayerStep) -> torch.Tensor:
        return self.block(x, step.adapters)
