"""What lowering may know of the base model: its sites, its compute dtype and, where a kind needs them, its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loraplex.models.base import BaseModel
from loraplex.models.sites import Site, SiteKind


@dataclass(frozen=True, slots=True)
class BaseView:
    """The base model as an adapter's loader sees it.

    ``weight`` gives a site's weight by name, dense, on the host: ``[out, in]`` of a linear site, ``[vocab, hidden]`` of
    an embedding, ``[n]`` of a norm; ``bias`` its bias ``[out]``, None where it has none. Read-only. They may have to
    dequantize or read a file: asked only where a kind cannot do without. ``tied``: the head multiplies by the
    embedding's matrix.
    """

    sites: tuple[Site, ...]
    dtype: torch.dtype
    weight: Callable[[str], torch.Tensor]
    bias: Callable[[str], torch.Tensor | None]
    tied: bool
    vocab_size: int

    def by_name(self) -> dict[str, Site]:
        """Site name -> site."""
        return {site.name: site for site in self.sites}

    def of(self, *kinds: SiteKind) -> tuple[Site, ...]:
        """The sites of these kinds, in site order."""
        return tuple(site for site in self.sites if site.kind in kinds)

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
    )
