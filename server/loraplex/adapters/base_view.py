"""What lowering may know of the base model: its sites, its compute dtype and, where a kind needs them, its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from loraplex.models.sites import Site


@dataclass(frozen=True, slots=True)
class BaseView:
    """The base model as an adapter's loader sees it.

    ``weight`` gives a site's dense weight ``[out, in]`` (an embedding's ``[vocab, hidden]``) by name, or None where it
    cannot; without it, checks against weights are skipped.
    """

    sites: tuple[Site, ...]
    dtype: torch.dtype
    weight: Callable[[str], torch.Tensor | None] | None = None

    def by_name(self) -> dict[str, Site]:
        """Site name -> site."""
        return {site.name: site for site in self.sites}

    def modules(self) -> str:
        """The module names, for messages: ``q_proj, k_proj, ...``."""
        return ", ".join(dict.fromkeys(site.module for site in self.sites))
