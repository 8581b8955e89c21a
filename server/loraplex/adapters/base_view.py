"""What lowering may know of the base model: its sites, its compute dtype and, where a kind needs them, its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loraplex.adapters.delta import LowRank
from loraplex.adapters.norms import as_matrix, row_norms
from loraplex.models.base import BaseModel
from loraplex.models.sites import Site, SiteKind


@dataclass(frozen=True, slots=True)
class BaseView:
    """The base model as an adapter's loader sees it.

    ``weight`` gives a site's weight by name, dense, on the host, of its ``weight_shape``; ``bias`` its bias ``[out]``,
    None where it has none. Read-only. They may have to
    dequantize, read a file or ask other ranks: asked only where a kind cannot do without. ``norms`` answers
    ``row_norms`` where that is less work than asking for a whole weight. ``tied``: the head multiplies by the
    embedding's matrix. ``aliases``: beginnings of module names as others spell them, each with its own, either of
    which an adapter may have (``spelling``).
    """

    sites: tuple[Site, ...]
    dtype: torch.dtype
    weight: Callable[[str], torch.Tensor]
    bias: Callable[[str], torch.Tensor | None]
    tied: bool
    vocab_size: int
    norms: Callable[[Site, LowRank], torch.Tensor] | None = None
    aliases: tuple[tuple[str, str], ...] = ()

    def by_name(self) -> dict[str, Site]:
        """Site name -> site."""
        return {site.name: site for site in self.sites}

    def of(self, *kinds: SiteKind) -> tuple[Site, ...]:
        """The sites of these kinds, in site order."""
        return tuple(site for site in self.sites if site.kind in kinds)

    def ends(self) -> tuple[Site, ...]:
        """The embedding and the head, in site order."""
        return tuple(site for site in self.sites if site.is_end)

    def row_norms(self, site: Site, change: LowRank) -> torch.Tensor:
        """``||W + scale B A||`` of every output of a linear site, of every feature of an embedding; float32 ``[out]``.
        The factors may be of any dtype."""
        if self.norms is not None:
            return self.norms(site, change)
        return row_norms(as_matrix(self.weight(site.name), site), change)

    def modules(self) -> str:
        """The module names, for messages: ``q_proj, k_proj, ...``."""
        return ", ".join(dict.fromkeys(site.module for site in self.sites))


def view_of(model: BaseModel) -> BaseView:
    """What lowering sees of a loaded model. Its tensors come to the host, where adapters are read."""

    def bias(site: str) -> torch.Tensor | None:
        found = model.dense_bias(site)
        return None if found is None else found.cpu()

    return BaseView(
        sites=model.sites(),
        dtype=model.dtype,
        weight=lambda site: model.dense_weight(site).cpu(),
        bias=bias,
        tied=model.tied,
        vocab_size=model.vocab_size,
        aliases=model.aliases,
    )
