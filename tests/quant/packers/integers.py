"""What the packers of GPTQ and AWQ share: matrices rounded to integers in groups, and checkpoints of them.

Weights are computed from the integers before anything is packed, and kept beside the checkpoint: nothing of ours, and
no unpacking, is between them and a test.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from loraplex.quant.base import WHOLE, Matrix

EXPECTED = "expected.safetensors"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Integers:
    """A matrix as codes ``[out, in]``, zeros and scales ``[groups, out]``, and the group of each input ``[in]``."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: torch.Tensor
    g_idx: np.ndarray

    def dense(self) -> torch.Tensor:
        """As the libraries have it, in the type of the scales; given in float32."""
        integers = self.codes.T.astype(np.int64) - self.zeros.astype(np.int64)[self.g_idx]
        weights = torch.from_numpy(integers) * self.scales[torch.from_numpy(self.g_idx)]
        assert weights.dtype is self.scales.dtype
        return weights.float().T.contiguous()


@dataclass(frozen=True)
class Rounding:
    """How a matrix is rounded. ``group`` -1: one group. ``shuffled``: inputs of a group stand apart."""

    bits: int
    group: int
    symmetric: bool
    shuffled: bool = False
    dtype: torch.dtype = torch.float16

    def round(self, weight: torch.Tensor, seed: int) -> Integers:
        """Zeros of asymmetric ones are any, both ends among them; scales are as small as they allow."""
        random = np.random.default_rng(seed)
        rows, columns = weight.shape
        size = columns if self.group == -1 else self.group
        groups, top = columns // size, (1 << self.bits) - 1
        g_idx = np.arange(columns) // size
        if self.shuffled:
            g_idx = random.permutation(g_idx)
        zeros = np.full((groups, rows), (top + 1) // 2)
        if not self.symmetric:
            zeros = random.integers(0, top + 1, (groups, rows))
            zeros[:, :4] = (0, 0, top, 0)
        values = weight.float().numpy().T  # [in, out]
        largest = np.stack([np.abs(values[g_idx == group]).max(0) for group in range(groups)])
        scales = torch.from_numpy(largest / np.maximum(zeros, top - zeros)).to(self.dtype)
        codes = np.rint(values / scales.float().numpy()[g_idx]) + zeros[g_idx]
        return Integers(np.clip(codes, 0, top).astype(np.uint32).T, zeros, scales, g_idx)


def write(
    dense: Path, out: Path, rounding: Rounding, pack: Callable[[Integers], Tensors], config: Mapping[str, object]
) -> None:
    """The dense checkpoint with every linear module packed, and its head where ``config`` says so."""
    out.mkdir()
    values = json.loads((dense / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**values, "quantization_config": config}))
    tensors, expected = load_file(dense / "model.safetensors"), {}
    for seed, key in enumerate(sorted(tensors)):
        name = key.removesuffix(".weight")
        if name.endswith("_proj") or (name == "lm_head" and config.get("lm_head")):
            integers = rounding.round(tensors.pop(key), seed)
            tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in pack(integers).items()}
            expected[name] = integers.dense()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    save_file(expected, out / EXPECTED)


def expected_weights(path: Path) -> Tensors:
    """Module -> its weight, float32."""
    return load_file(path / EXPECTED)


def words(fields: np.ndarray, bits: int) -> np.ndarray:
    """``[m, n]`` -> uint32 ``[m, n * bits / 32]``, the first field of each word in its low bits."""
    per_word = 32 // bits
    packed = np.zeros((fields.shape[0], fields.shape[1] // per_word), np.uint32)
    for place in range(per_word):
        packed |= fields[:, place::per_word].astype(np.uint32) << np.uint32(bits * place)
    return packed


def as_int32(packed: np.ndarray) -> torch.Tensor:
    """As checkpoints store words."""
    return torch.from_numpy(np.ascontiguousarray(packed).view(np.int32))


class TensorReader:
    """Tensors of one matrix in memory (``WeightReader``)."""

    def __init__(self, matrix: Matrix, parts: Tensors) -> None:
        self.tensors = {f"{matrix.name}.{part}": tensor.contiguous() for part, tensor in parts.items()}

    def keys(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].dtype

    def tensor(self, key: str, rows: slice = WHOLE, cols: slice = WHOLE) -> torch.Tensor:
        tensor = self.tensors[key]
        return tensor[rows] if tensor.dim() == 1 else tensor[rows, cols]
