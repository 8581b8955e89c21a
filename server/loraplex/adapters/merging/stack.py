"""Matrices of one shape that are looked at together: what is done to all of them at once is one piece of work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex.adapters.merging.matrix import Block, Matrix, Product, rounds_nothing


class Stack(Protocol):
    """One or more matrices of one shape."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of each."""
        ...

    def __len__(self) -> int: ...

    def fill(self, at: Block, out: torch.Tensor) -> None:
        """As each one's, into ``out`` ``[n, rows, columns]``."""
        ...


def stacked(matrices: Sequence[Matrix]) -> Stack:
    """One or more."""
    products = [each for each in matrices if isinstance(each, Product)]
    if len(products) < len(matrices) or len({(each.left.shape, each.left.dtype) for each in products}) > 1:
        return _Each(matrices)
    scales = [each.scale for each in products]
    return _Products(products, torch.tensor(scales).view(-1, 1, 1), all(map(rounds_nothing, scales)))


@dataclass(frozen=True, slots=True)
class _Each:
    """Those of ``matrices``."""

    matrices: Sequence[Matrix]

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrices[0].shape

    def __len__(self) -> int:
        return len(self.matrices)

    def fill(self, at: Block, out: torch.Tensor) -> None:
        for matrix, part in zip(self.matrices, out, strict=True):
            matrix.fill(at, part)


@dataclass(frozen=True, slots=True)
class _Products:
    """Products of one rank. ``scales`` ``[n, 1, 1]`` may come ``before`` the product, or only after it."""

    products: Sequence[Product]
    scales: torch.Tensor
    before: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.products[0].shape

    def __len__(self) -> int:
        return len(self.products)

    def fill(self, at: Block, out: torch.Tensor) -> None:
        left = torch.stack([each.left[at.rows] for each in self.products]).float()
        right = torch.stack([each.right[:, at.columns] for each in self.products]).float()
        if self.before:
            torch.bmm(left.mul_(self.scales), right, out=out)
        else:
            torch.bmm(left, right, out=out).mul_(self.scales)
