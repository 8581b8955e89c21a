"""The Mamba2 mixer's description: five stretches of one projection, cut over ranks by heads and groups.

z, x, dt and the vectors of the heads are cut by heads; B and C by groups, of which ranks may share one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from loraplex.layers.gated_norm import GatedNorm, NormGroups
from loraplex.layers.mamba import MambaMixer, MambaParts, MambaScales, MambaShape
from loraplex.layers.rows import RowsForm
from loraplex.models.mixers.base import BuiltMixer, Held, HeldLinear, HeldSmall
from loraplex.models.sites import Site, SiteKind
from loraplex.parallel.shard import Cut, Shard, Stretch
from loraplex_kernels.ssd import GateNorm
from loraplex_kernels.states import StateShape

if TYPE_CHECKING:
    from loraplex.models.workbench import Workbench


@dataclass(frozen=True, slots=True)
class MambaNorm:
    """The gated norm: over each group's values, before or after the gate."""

    eps: float
    before_gate: bool = False


@dataclass(frozen=True, slots=True)
class MambaMultipliers:
    """Constants of Falcon-H1: of the input, of z, x, B, C and dt, of the output."""

    inputs: float = 1.0
    projected: tuple[float, float, float, float, float] = (1.0,) * 5
    outputs: float = 1.0


@dataclass(frozen=True, slots=True)
class MambaSpec:
    """``name`` is the module's below its layer; ``what``: the key in config.json that ``heads`` stands under.
    ``norm`` None: the scan is gated without one. ``limits``: of time steps of the prompt."""

    hidden_size: int
    heads: int
    head_dim: int
    groups: int
    state_size: int
    conv_width: int
    norm: MambaNorm | None
    name: str = "mixer"
    what: str = "num_heads"
    in_bias: bool = False
    out_bias: bool = False
    conv_bias: bool = True
    limits: tuple[float, float] = (0.0, math.inf)
    multipliers: MambaMultipliers = MambaMultipliers()

    @property
    def inner(self) -> int:
        """Values of all heads."""
        return self.heads * self.head_dim

    @property
    def limits_steps(self) -> bool:
        """Whether the limits can change a time step, which is never below zero."""
        return self.limits[0] > 0.0 or self.limits[1] < math.inf

    def sites(self) -> tuple[Site, ...]:
        by_head = Cut(Shard.COLUMN, self.heads, self.what)
        z, x = (Stretch(self.inner, self.heads, name) for name in "zx")
        b, c = (Stretch(self.groups * self.state_size, self.groups, name) for name in "BC")
        projected = replace(by_head, stretches=(z, x, b, c, Stretch(self.heads, self.heads, "dt")))
        convolved = replace(by_head, stretches=(x, b, c))
        channels = sum(one.features for one in convolved.stretches)
        width = sum(one.features for one in projected.stretches)
        out_cut = replace(by_head, shard=Shard.ROW)
        parts = (
            Site("in_proj", SiteKind.LINEAR, self.hidden_size, width, self.in_bias, projected),
            Site("conv1d", SiteKind.CONV, self.conv_width, channels, self.conv_bias, convolved),
            *(Site(name, SiteKind.VECTOR, self.heads, self.heads, cut=by_head) for name in ("dt_bias", "A_log", "D")),
            Site("out_proj", SiteKind.LINEAR, self.inner, self.hidden_size, self.out_bias, out_cut),
            *(() if self.norm is None else (Site("norm", SiteKind.NORM, self.inner, self.inner, cut=by_head),)),
        )
        return tuple(replace(site, name=f"{self.name}.{site.name}") for site in parts)

    def state_shape(self, size: int, num_layers: int) -> StateShape:
        """Of ``num_layers`` such layers, on one of ``size`` ranks."""
        shape = self._shape(0, 0, size)
        return StateShape(
            num_layers, sum(shape.sizes[1:4]), self.conv_width - 1, shape.heads, self.head_dim, self.state_size
        )

    def build(self, bench: Workbench, layer: str) -> BuiltMixer:
        name, runtime = f"{layer}.{self.name}", bench.runtime
        in_proj, out_proj = bench.linear(f"{name}.in_proj"), bench.linear(f"{name}.out_proj")
        conv = bench.own_tensor(f"{name}.conv1d", RowsForm.CONVOLVED)
        dt_bias, a_log, d = (
            bench.own_tensor(f"{name}.{part}", RowsForm.ELEMENTWISE) for part in ("dt_bias", "A_log", "D")
        )
        norm = None if self.norm is None else self._gated_norm(bench, f"{name}.norm", self.norm)
        parts = MambaParts(
            in_proj=in_proj,
            conv=conv,
            a_log=a_log,
            d=d,
            dt_bias=dt_bias,
            norm=norm,
            out_proj=out_proj,
            limits=self.limits,
            conv_backend=runtime.conv,
            ssd_backend=runtime.ssd,
        )
        shape = self._shape(bench.next_state_layer(), bench.group.rank, bench.group.size)
        held: tuple[Held, ...] = (HeldLinear(in_proj), HeldLinear(out_proj), *map(HeldSmall, (conv, dt_bias, a_log, d)))
        if norm is not None:
            held += (HeldSmall(norm),)
        return BuiltMixer(MambaMixer(shape, parts, self._scales(shape, bench)), held)

    def _shape(self, layer: int, rank: int, size: int) -> MambaShape:
        """What one rank holds: with each run of its heads that share a group, that group's B and C."""
        blocks = self._norm_groups(rank, size).blocks
        return MambaShape(layer, self.heads // size, self.head_dim, len(blocks), self.state_size)

    def _norm_groups(self, rank: int, size: int) -> NormGroups:
        share = self.heads // size
        return NormGroups.of(slice(rank * share, (rank + 1) * share), self.heads, self.groups, self.head_dim)

    def _gated_norm(self, bench: Workbench, site: str, norm: MambaNorm) -> GatedNorm:
        groups = self._norm_groups(bench.group.rank, bench.group.size)
        weight = bench.tensor(site)
        return GatedNorm(
            site,
            GateNorm(weight, len(groups.blocks), norm.eps, norm.before_gate),
            groups,
            rows=bench.rows(RowsForm.ELEMENTWISE, len(weight), 1),
            backend=bench.runtime.ssd,
            group=bench.group,
        )

    def _scales(self, shape: MambaShape, bench: Workbench) -> MambaScales:
        of_input, of_parts, of_output = self.multipliers.inputs, self.multipliers.projected, self.multipliers.outputs
        projected = None
        if any(one != 1.0 for one in of_parts):
            placement = bench.placement
            projected = torch.cat([torch.full((n,), one) for n, one in zip(shape.sizes, of_parts, strict=True)])
            projected = projected.to(device=placement.device, dtype=placement.dtype)
        return MambaScales(of_input, projected, of_output)
