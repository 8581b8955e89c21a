"""bitsandbytes checkpoints, by the library itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear8bitLt
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel


def in_4_bits(kind: str, *, nested: bool = False) -> Callable[[Path, Path], None]:
    """Writes a dense checkpoint as ``kind`` ("nf4" or "fp4")."""

    def make(dense: Path, out: Path) -> None:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=nested,
            bnb_4bit_compute_dtype=torch.float32,
        )
        model(dense, quantization_config=config).save_pretrained(out)

    return make


def in_8_bits(dense: Path, out: Path) -> None:
    """Writes a dense checkpoint in int8."""
    model(dense, quantization_config=BitsAndBytesConfig(load_in_8bit=True)).save_pretrained(out)


def model(path: Path, **options: object) -> PreTrainedModel:
    """The checkpoint in transformers, computing in float32."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()


def dense_of_4_bits(path: Path) -> dict[str, torch.Tensor]:
    """Module -> its weight, as bitsandbytes dequantizes it."""
    return {
        name: bnb.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        for name, module in model(path).named_modules()
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None
    }


def dense_of_8_bits(path: Path) -> dict[str, torch.Tensor]:
    """The same of int8."""
    return {
        name: bnb.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        for name, module in model(path).named_modules()
        if isinstance(module, Linear8bitLt)
    }
