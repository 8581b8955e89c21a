"""bitsandbytes checkpoints, by the library itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit, Linear8bitLt
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


def skipping(dense: Path, out: Path, bits: int, modules: list[str], *, kind: str = "fp4") -> None:
    """Writes a dense checkpoint in 4 (``kind``) or 8 bits, save some modules."""
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type=kind,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=modules,
    )
    model(dense, quantization_config=config).save_pretrained(out)


def model(path: Path, **options: object) -> PreTrainedModel:
    """The checkpoint in transformers, computing in float32."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()


def exact_model(path: Path) -> PreTrainedModel:
    """A checkpoint of 4 bits in transformers, whose products are float32's everywhere."""
    return exact(model(path))


def exact(made: PreTrainedModel) -> PreTrainedModel:
    """The same model with float32's products in its modules of 4 bits.

    On processors with AVX512-BF16 bitsandbytes rounds inputs and scales to bfloat16, whatever the compute dtype is.
    """
    for module in made.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return made


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


def table(kind: str) -> torch.Tensor:
    """The numbers of "nf4" or "fp4", float32 [16], in the order of their codes."""
    numbers: torch.Tensor = bnb.get_4bit_type(kind, device="cpu")
    return numbers
