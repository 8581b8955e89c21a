"""What quantizing at load comes to: the weights of a dense checkpoint, by bitsandbytes' own functions, and for fp8 by
three lines."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from bitsandbytes import functional as bnb
from safetensors.torch import load_file


def left_dense(dense: Path, out: Path) -> None:
    """The server quantizes it."""
    shutil.copytree(dense, out)


def in_4_bits(kind: str) -> Callable[[Path], dict[str, torch.Tensor]]:
    """Module -> its weight in ``kind`` ("nf4" or "fp4")."""

    def dense(path: Path) -> dict[str, torch.Tensor]:
        return {name: through_4_bits(weight, kind) for name, weight in _linear(path).items()}

    return dense


def in_int8(path: Path) -> dict[str, torch.Tensor]:
    """Module -> its weight in int8 by rows."""
    return {
        name: bnb.int8_vectorwise_dequant(*bnb.int8_vectorwise_quant(weight)[:2])
        for name, weight in _linear(path).items()
    }


def in_fp8(path: Path) -> dict[str, torch.Tensor]:
    """Module -> its weight in e4m3 by rows."""
    found = {}
    for name, weight in _linear(path).items():
        scale = weight.abs().amax(1, keepdim=True) / 448
        found[name] = (weight / scale).to(torch.float8_e4m3fn).float() * scale
    return found


def through_4_bits(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A weight in any floating type, quantized and dequantized: float32."""
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, quant_type=kind)).float()


def _linear(path: Path) -> dict[str, torch.Tensor]:
    return {
        key.removesuffix(".weight"): weight
        for key, weight in load_file(path / "model.safetensors").items()
        if key.endswith("_proj.weight")
    }
