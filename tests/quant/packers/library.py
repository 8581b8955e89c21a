"""What libraries make of one dense matrix in the forms that exports are written in, and of a model's matrices again."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

Tensors = dict[str, torch.Tensor]


def stored(form: str, name: str, weight: torch.Tensor) -> Tensors:
    """The tensors of the module ``name`` in a checkpoint: nf4, fp4 and int8 by bitsandbytes, fp8 by transformers."""
    key = f"{name}.weight"
    match form:
        case "nf4" | "fp4":
            codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=form)
            return {key: codes} | {f"{key}.{end}": tensor for end, tensor in state.as_dict(packed=True).items()}
        case "int8":
            codes, scales, _ = bnb.int8_vectorwise_quant(weight)
            return {key: codes, f"{name}.SCB": scales, f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8)}
        case "fp8":
            config = FineGrainedFP8Config(weight_block_size=(128, 128))
            made: Tensors = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({key: weight})
            return made
    raise AssertionError(form)


def dense_weights(model: torch.nn.Module) -> Tensors:
    """Module -> its weight as the library dequantizes it, float32, of all linear modules but the head."""
    return {
        name: _dense(module).float()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def _dense(module: torch.nn.Linear) -> torch.Tensor:
    weight = module.weight
    if isinstance(module, Linear4bit):
        return bnb.dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(module, Linear8bitLt):
        return bnb.int8_vectorwise_dequant(weight.data, weight.SCB)
    return weight.data
