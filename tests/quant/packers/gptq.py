"""GPTQ checkpoints, packed as AutoGPTQ and GPTQModel pack them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tests.quant.packers.integers import Integers, Rounding, Tensors, as_int32, words, write


def pack(integers: Integers, bits: int, layout: str = "gptq", *, g_idx: bool = True) -> Tensors:
    """The tensors of a matrix; of layout gptq, words of zeros have 1 of every field subtracted at once."""
    zeros = words(integers.zeros, bits)
    if layout == "gptq":
        zeros = zeros - np.uint32(sum(1 << place for place in range(0, 32, bits)))
    tensors = {
        "qweight": as_int32(words(integers.codes, bits).T),
        "qzeros": as_int32(zeros),
        "scales": integers.scales,
    }
    return tensors | ({"g_idx": torch.from_numpy(integers.g_idx.astype(np.int32))} if g_idx else {})


def checkpoint(rounding: Rounding, layout: str = "gptq", **config: object) -> Callable[[Path, Path], None]:
    """Writes a dense checkpoint as GPTQ; ``config`` is put into its quantization_config."""

    def make(dense: Path, out: Path) -> None:
        values = {
            "quant_method": "gptq",
            "bits": rounding.bits,
            "group_size": rounding.group,
            "sym": rounding.symmetric,
            "desc_act": rounding.shuffled,
            "checkpoint_format": layout,
            **config,
        }
        write(dense, out, rounding, partial(pack, bits=rounding.bits, layout=layout), values)

    return make
