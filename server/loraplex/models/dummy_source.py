"""Random weights from config.json alone, for measuring without a checkpoint. Equal seeds give equal weights."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from loraplex.json_config import read_config
from loraplex.models.spec import DecoderSpec
from loraplex.quant.base import WHOLE, Placement, WeightReader


class DummySource:
    """A directory of which only config.json is read."""

    def config(self, path: Path) -> dict[str, object]:
        return read_config(path)

    @contextmanager
    def open(self, path: Path, spec: DecoderSpec, placement: Placement) -> Iterator[WeightReader]:
        yield DummyReader(spec.tensors(), placement)


class DummyReader:
    """Tensors made on the device when asked for, each from its own seed, so that their order does not matter."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], placement: Placement, seed: int = 0) -> None:
        self._shapes = shapes
        self._placement = placement
        self._seed = seed

    def keys(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        return self._placement.dtype

    def tensor(self, key: str, rows: slice = WHOLE, cols: slice = WHOLE) -> torch.Tensor:
        """Matrices and kernels of standard deviation 1 / sqrt(in), which keep activations of order 1; norms and other
        vectors of 1; biases of 0."""
        shape, device, dtype = self._shapes[key], self._placement.device, self._placement.dtype
        if len(shape) == 1:
            fill = 0.0 if key.endswith(".bias") else 1.0
            return torch.full(shape, fill, dtype=dtype, device=device)[rows]
        generator = torch.Generator(device).manual_seed(zlib.crc32(key.encode()) ^ self._seed)
        matrix = torch.empty(shape, dtype=dtype, device=device)
        matrix.normal_(0.0, 1 / math.sqrt(math.prod(shape[1:])), generator=generator)
        return matrix[rows, cols] if len(shape) == 2 else matrix[rows]
