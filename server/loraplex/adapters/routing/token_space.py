"""What prototypes are compared with: a unit vector for each token of the vocabulary, known before any layer runs.

Of feature ``centroid`` it is the token's row of the base's embedding; of ``arrow`` the first layer's input, which is
that row through the layer's norm. An RMS norm is a factor for each row times a weight for each feature, so that the
direction of its output is that of row times weight, whatever its epsilon and a family's constant factors are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.routing.files import ARROW
from loraplex.errors import UnsupportedFeature
from loraplex.models.sites import Site, SiteKind

#: modules of a first layer that read what its norm gives: of attention, and of a state-space mixer
INPUT_MODULES: Final = ("q_proj", "k_proj", "v_proj", "in_proj")
#: rows of the embedding that are widened to float32 at a time
_ROWS: Final = 4096


@dataclass(frozen=True, slots=True)
class FirstLayer:
    """The norm in front of the first layer, and the sites that read what it gives."""

    norm: Site
    inputs: tuple[Site, ...]


def embedding_site(base: BaseView) -> Site:
    """The site of the base's embedding."""
    return next(site for site in base.sites if site.kind is SiteKind.EMBEDDING)


def first_layer(base: BaseView) -> FirstLayer:
    """Where the token embeddings go first.

    Raises UnsupportedFeature: the first layer has neither attention nor a state-space mixer.
    """
    hidden = embedding_site(base).out_features
    names = (re.match(r"(.+?\.0)\.", site.name) for site in base.sites)
    prefix = next(match[1] for match in names if match)
    sites = [site for site in base.sites if site.name.startswith(f"{prefix}.")]
    inputs = tuple(site for site in sites if site.module in INPUT_MODULES and site.in_features == hidden)
    if not inputs:
        raise UnsupportedFeature(
            f"feature {ARROW!r}: {prefix} has none of {', '.join(INPUT_MODULES)}: what its modules read is not known "
            "before it has run",
            field="feature",
        )
    # norms of blocks stand in their order, before those within mixers
    norm = next(site for site in sites if site.kind is SiteKind.NORM and site.out_features == hidden)
    return FirstLayer(norm, inputs)


class TokenSpace:
    """The vectors of one feature on one base. Holds the base's embedding, in the dtype it has: not to be kept."""

    def __init__(self, base: BaseView, feature: str) -> None:
        """Raises UnsupportedFeature as ``first_layer`` does."""
        self._rows = base.weight(embedding_site(base).name)
        self._factors = base.weight(first_layer(base).norm.name).float() if feature == ARROW else None

    def vectors(self, tokens: torch.Tensor | slice) -> torch.Tensor:
        """Unit vectors of tokens, ``[n, H]`` in float32. A row that is zero, or not finite, has no direction: zeros."""
        rows = self._rows[tokens].float()
        if self._factors is not None:
            rows = rows * self._factors
        rows = torch.where(rows.isfinite().all(dim=1, keepdim=True), rows, 0.0)
        # twice: the square of a small row's norm may not be a float32
        rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return torch.nn.functional.normalize(rows, dim=1)

    def blocks(self) -> Iterator[torch.Tensor]:
        """The vectors of the whole vocabulary, in order, some thousand at a time."""
        for start in range(0, len(self._rows), _ROWS):
            yield self.vectors(slice(start, start + _ROWS))
