"""The seam between a layer and what it mixes tokens or features with. The next kind of mixer is a file beside this."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from loraplex.layers.linear import Linear
from loraplex.layers.own_tensor import OwnTensor
from loraplex.layers.rows_table import RowsTable
from loraplex.layers.step import LayerStep
from loraplex.models.base import TableRef
from loraplex.models.sites import Site, SiteKind

if TYPE_CHECKING:
    from loraplex.models.workbench import Workbench


class MixerSpec(Protocol):
    """A mixer described by numbers, without any weight."""

    def sites(self) -> tuple[Site, ...]:
        """Every adaptable module and parameter of it, named below its layer, in checkpoint order, norms last."""
        ...

    def build(self, bench: Workbench, layer: str) -> BuiltMixer:
        """Read its tensors and make it; ``layer`` is its layer's checkpoint name."""
        ...


class Mixer(Protocol):
    """``[T, H]`` -> a new ``[T, H]``."""

    def __call__(self, x: torch.Tensor, step: LayerStep) -> torch.Tensor: ...


class Held(Protocol):
    """A layer's part that holds sites: a ``Linear``, a norm, a small parameter."""

    def refs(self) -> dict[str, TableRef]:
        """Site -> where its changes are written."""
        ...

    def weight(self, site: str) -> torch.Tensor: ...

    def bias(self, site: str) -> torch.Tensor | None: ...


@dataclass(frozen=True, slots=True)
class BuiltMixer:
    """A mixer, and all that holds its sites."""

    run: Mixer
    held: tuple[Held, ...]


@dataclass(frozen=True, slots=True)
class HeldLinear:
    """The sites of a packed layer."""

    linear: Linear

    def refs(self) -> dict[str, TableRef]:
        linear = self.linear
        return {
            site: TableRef(linear.table, part, linear.rows[part], linear.folded)
            for part, site in enumerate(linear.sites)
        }

    def weight(self, site: str) -> torch.Tensor:
        return torch.split(self.linear.weight.dequantize(), list(self.linear.table.part_sizes))[self._part(site)]

    def bias(self, site: str) -> torch.Tensor | None:
        bias = self.linear.bias
        return None if bias is None else torch.split(bias, list(self.linear.table.part_sizes))[self._part(site)]

    def _part(self, site: str) -> int:
        return self.linear.sites.index(site)


class Small(Protocol):
    """A norm, or a small parameter: one site by itself."""

    @property
    def site(self) -> str: ...

    @property
    def weight(self) -> torch.Tensor: ...

    @property
    def rows(self) -> RowsTable: ...


@dataclass(frozen=True, slots=True)
class HeldSmall:
    """The one site of a norm or of a small parameter."""

    small: Small

    def refs(self) -> dict[str, TableRef]:
        return {self.small.site: TableRef(None, 0, self.small.rows)}

    def weight(self, site: str) -> torch.Tensor:
        return self.small.weight

    def bias(self, site: str) -> torch.Tensor | None:
        return self.small.bias if isinstance(self.small, OwnTensor) else None


def below(layer: str, sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """Sites of a mixer under their whole names."""
    return tuple(replace(site, name=f"{layer}.{site.name}") for site in sites)


def norm_site(name: str, size: int) -> Site:
    """A norm that every rank holds whole."""
    return Site(name, SiteKind.NORM, size, size)
