"""The tensors of a LoRA by the sites they belong to: named by PEFT, held against config and base, in pairs.

Sources: peft 0.21 tuners/lora/layer.py (shapes) and utils/save_and_load.py (names).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.adapters.reading.phrases import some
from loraplex.adapters.reading.site_tensors import made_for_another
from loraplex.adapters.reading.tensors import TensorBag
from loraplex.errors import InvalidAdapter, Mismatch
from loraplex.models.sites import Site, SiteKind

#: per site kind: the suffixes of A ``[r, in]`` and B ``[out, r]``
_SUFFIXES: Final = {
    SiteKind.LINEAR: (".lora_A.weight", ".lora_B.weight"),
    SiteKind.EMBEDDING: (".lora_embedding_A", ".lora_embedding_B"),
}


@dataclass(frozen=True, slots=True)
class LandedFactors:
    """An adapter's factors by site, in their stored dtypes and shapes."""

    a: dict[str, torch.Tensor] = field(default_factory=dict)
    b: dict[str, torch.Tensor] = field(default_factory=dict)

    def place(self, key: str, tensor: torch.Tensor, sites: Mapping[str, Site]) -> bool:
        """Put a tensor where its name says; False when it is none of these."""
        for kind, suffixes in _SUFFIXES.items():
            for suffix, place in zip(suffixes, (self.a, self.b), strict=True):
                site = sites.get(key.removesuffix(suffix)) if key.endswith(suffix) else None
                if site is not None and site.kind is kind:
                    place[site.name] = tensor
                    return True
        return False

    @property
    def sites(self) -> set[str]:
        """Names of the sites that have a factor."""
        return {*self.a, *self.b}

    def is_turned(self, site: str, other: str) -> bool:
        """Whether the pair of one site is the transposed pair of the other."""
        return torch.equal(self.a[site], self.b[other].T) and torch.equal(self.b[site], self.a[other].T)

    def check(self, targeted: set[str], where: str) -> None:
        """Config and tensors must speak of the same sites, and every A has its B. Raises Mismatch, InvalidAdapter."""
        missing = sorted(targeted - self.sites)
        extra = sorted(self.sites - targeted)
        if missing:
            raise Mismatch(
                f"{where}: only part of the adapter lands: of {len(targeted)} sites that target_modules selects, "
                f"{len(missing)} have no tensors: {some(missing)}"
            )
        if extra:
            raise Mismatch(
                f"{where}: {len(extra)} sites have tensors but are not selected by target_modules: {some(extra)}"
            )
        for part, one, other in (("A", self.a, self.b), ("B", self.b, self.a)):
            lonely = sorted(other.keys() - one.keys())
            if lonely:
                raise InvalidAdapter(f"{where}: sites without lora_{part}, which comes in a pair: {some(lonely)}")


@dataclass(frozen=True, slots=True)
class Blocks:
    """How many blocks stand on the diagonal of A and of B, outside of which they are zero; 1: dense.

    A block-diagonal matrix is saved as its blocks below each other: A as ``[r, in / a]``, B as ``[out, r / b]``.
    """

    a: int = 1
    b: int = 1


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One site's own tensors. ``a``: ``[r, in]`` and ``b``: ``[out, r]`` in their stored dtypes; ``shift``: what is
    added to the site's bias, ``[out]`` float32."""

    site: Site
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    shift: torch.Tensor | None = None

    def delta(self, dtype: torch.dtype) -> SiteDelta:
        """The plain change: the factors in ``dtype``, and the shift."""
        return SiteDelta(LowRank(self.a.to(dtype), self.b.to(dtype), self.scale), shift=self.shift)


def land_factors(bag: TensorBag, base: BaseView) -> LandedFactors:
    """The factors of every site. What lands on no site stays in the bag."""
    sites = base.by_name()
    landed = LandedFactors()
    for name in bag:
        tensor = bag.get(name)
        if tensor is not None and landed.place(name, tensor, sites):
            bag.take(name)
    return landed


def whole_a(stored: torch.Tensor, site: Site, rank: int, blocks: int, where: str) -> torch.Tensor:
    """A ``[r, in]`` as it was saved. Raises InvalidAdapter: another rank than the config's, or ``blocks`` do not divide
    it; Mismatch: made for another base."""
    named = f"{where}: lora_A of {site.name!r}"
    _check_divides(blocks, (rank, site.in_features), named)
    size = site.in_features // blocks
    if stored.dim() == 2 and stored.shape[1] == size and stored.shape[0] != rank:
        raise _other_rank(named, stored, (rank, size), stored.shape[0], rank)
    _check_shape(named, stored, (rank, size), site)
    return _on_diagonal(stored, blocks)


def whole_b(stored: torch.Tensor, site: Site, rank: int, blocks: int, where: str) -> torch.Tensor:
    """B ``[out, r]``; otherwise as ``whole_a``."""
    named = f"{where}: lora_B of {site.name!r}"
    _check_divides(blocks, (site.out_features, rank), named)
    size = rank // blocks
    if stored.dim() == 2 and stored.shape[0] == site.out_features and stored.shape[1] != size:
        raise _other_rank(named, stored, (site.out_features, size), stored.shape[1] * blocks, rank)
    _check_shape(named, stored, (site.out_features, size), site)
    return _on_diagonal(stored, blocks)


def _on_diagonal(stored: torch.Tensor, blocks: int) -> torch.Tensor:
    """``blocks`` matrices that are saved below each other, put on the diagonal of a larger one."""
    if blocks == 1:
        return stored
    height, width = len(stored) // blocks, stored.shape[1]
    whole = stored.new_zeros(len(stored), width * blocks)
    for index in range(blocks):
        rows = slice(index * height, (index + 1) * height)
        whole[rows, index * width : (index + 1) * width] = stored[rows]
    return whole


def _check_divides(blocks: int, shape: tuple[int, int], named: str) -> None:
    if any(size % blocks for size in shape):
        raise InvalidAdapter(f"{named} is {list(shape)}, which {blocks} blocks do not divide")


def _check_shape(named: str, stored: torch.Tensor, expected: tuple[int, int], site: Site) -> None:
    found = tuple(stored.shape)
    if found != expected:
        why = made_for_another(site, found, expected)
        raise Mismatch(f"{named} has shape {list(found)}, expected {list(expected)}: {why}")


def _other_rank(named: str, stored: torch.Tensor, expected: tuple[int, int], found: int, rank: int) -> InvalidAdapter:
    return InvalidAdapter(
        f"{named} has shape {list(stored.shape)}, expected {list(expected)}: rank {found}, where adapter_config.json "
        f"says {rank}"
    )


def check_range(name: str, delta: SiteDelta, where: str) -> None:
    """Raises InvalidAdapter: the factors, rounded and with their scales, leave the range of their dtype."""
    assert delta.low_rank is not None
    a, b, scale = delta.low_rank.a, delta.low_rank.b, delta.low_rank.scale
    # rounding to a narrower dtype, or the scales folded into B, may leave its range
    by_row = b.abs().amax(1).float() * scale
    if delta.out_scale is not None:
        by_row = by_row * delta.out_scale.abs()
    largest = max(_largest(a), _largest(b), _largest(by_row))
    if not largest <= torch.finfo(b.dtype).max:
        raise InvalidAdapter(
            f"{where}: the factors of {name!r} (scale {scale:g}) leave the range of the base's {b.dtype}"
        )


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().amax())
