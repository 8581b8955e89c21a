"""Memory that one site after another uses for its intermediate values.

A site's dense matrix takes megabytes. Memory of that size comes from the system page by page, each cleared first, and
goes back as soon as it is free, which costs more than most of what is computed in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Scratch:
    """One merge's. By what they are used for, as large as the largest that was asked for."""

    _flat: dict[str, torch.Tensor] = field(default_factory=dict)

    def like(self, use: str, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous float32 tensor of this shape, of any values; good until the next one for the same ``use``."""
        return self.of(use, *tensor.shape)

    def of(self, use: str, *shape: int) -> torch.Tensor:
        """As ``like``."""
        count = torch.Size(shape).numel()
        if use not in self._flat or self._flat[use].numel() < count:
            self._flat.pop(use, None)
            self._flat[use] = torch.empty(count)
        return self._flat[use][:count].view(shape)
