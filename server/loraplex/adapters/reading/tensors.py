"""The tensors of one adapter file, each of which must be taken by somebody.

Fail-closed: what no kind and no common part takes lands nowhere, and an adapter with such a tensor is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import torch

#: how PEFT's tensor names begin
PREFIX: Final = "base_model.model."


class TensorBag:
    """Tensors by their names below ``base_model.model.``; finite, in their stored dtypes. ``where`` names their file.

    ``metadata`` is what the file says of itself beside them (safetensors' ``__metadata__``).
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], where: str, metadata: Mapping[str, str] | None = None
    ) -> None:
        self.where = where
        self.metadata = dict(metadata or {})
        self._left = dict(tensors)

    def __iter__(self) -> Iterator[str]:
        """Names of what nobody has taken yet, in the file's order; one may take while going over them."""
        return iter([key.removeprefix(PREFIX) for key in self._left if key.startswith(PREFIX)])

    def get(self, name: str) -> torch.Tensor | None:
        """A tensor, left where it is."""
        return self._left.get(PREFIX + name)

    def take(self, name: str) -> torch.Tensor | None:
        """A tensor, which lands with the caller."""
        return self._left.pop(PREFIX + name, None)

    def take_shared(self, name: str) -> torch.Tensor | None:
        """A tensor of no module, by its full name (VeRA's projections are ``base_model.vera_A``)."""
        return self._left.pop(name, None)

    @property
    def left(self) -> tuple[str, ...]:
        """Full names of what nobody has taken."""
        return tuple(self._left)
