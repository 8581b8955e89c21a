"""AWQ checkpoints of version gemm, packed as AutoAWQ packs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests.quant.packers.integers import Integers, Rounding, Tensors, as_int32, write

#: from a word's low bits up
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(integers: Integers) -> Tensors:
    """The tensors of a matrix."""
    return {
        "qweight": as_int32(_words(integers.codes.T)),
        "qzeros": as_int32(_words(integers.zeros)),
        "scales": integers.scales,
    }


def checkpoint(group: int, **config: object) -> Callable[[Path, Path], None]:
    """Writes a dense checkpoint as AWQ; ``config`` is put into its quantization_config."""
    rounding = Rounding(4, group, symmetric=False, dtype=torch.float16)
    values = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm", **config}

    def make(dense: Path, out: Path) -> None:
        write(dense, out, rounding, pack, values)

    return make


def _words(fields: np.ndarray) -> np.ndarray:
    """``[m, n]`` -> uint32 ``[m, n / 8]``."""
    packed = np.zeros((fields.shape[0], fields.shape[1] // 8), np.uint32)
    for place, column in enumerate(ORDER):
        packed |= fields[:, column::8].astype(np.uint32) << np.uint32(4 * place)
    return packed
