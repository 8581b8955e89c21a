"""The quantized checkpoints that every test of formats runs over; the next format is a line of ``CASES``.

All are made from one dense checkpoint, whose sizes let groups of 128 columns be cut over 4 ranks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from tests.quant.packers import at_load, awq, bnb, compressed, fp8, gguf, gptq
from tests.quant.packers.integers import Rounding, expected_weights
from tests.tiny import tiny_checkpoint

DIMENSIONS: Final[Mapping[str, object]] = MappingProxyType(
    {
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "initializer_range": 0.05,
    }
)
#: linear modules of a layer of a checkpoint
MODULES: Final = tuple(f"self_attn.{one}_proj" for one in "qkvo") + tuple(
    f"mlp.{one}_proj" for one in ("gate", "up", "down")
)

#: groups of compressed-tensors
CT_INT4 = compressed.scheme("pack-quantized", num_bits=4, strategy="group", group_size=128, symmetric=False)
CT_INT8 = compressed.scheme("int-quantized", num_bits=8, strategy="channel")
CT_FLOAT8 = compressed.scheme("float-quantized", num_bits=8, type="float", strategy="channel")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One format. ``bits``: what the format takes for a weight of the linear modules, scales included."""

    make: Callable[[Path, Path], None]
    """Writes the dense checkpoint (a directory) in this format: a directory, or a file for GGUF."""
    dense: Callable[[Path], Tensors]
    """Module -> float32 weight, by the library that wrote the checkpoint, or by the packer's own arithmetic."""
    bits: float
    #: what the server is told to make of it at load
    quantization: str = ""
    #: group sizes that can share the checkpoint
    ranks: tuple[int, ...] = (2, 4)
    #: of a format that is one file
    suffix: str = ""


CASES: Final[Mapping[str, Case]] = MappingProxyType(
    {
        "nf4": Case(bnb.in_4_bits("nf4"), bnb.dense_of_4_bits, 4.5),
        "nf4-nested": Case(bnb.in_4_bits("nf4", nested=True), bnb.dense_of_4_bits, 4.127),
        "fp4": Case(bnb.in_4_bits("fp4"), bnb.dense_of_4_bits, 4.5),
        "fp8-block": Case(
            fp8.checkpoint(fp8.in_blocks, "weight_scale_inv", weight_block_size=[128, 128]),
            fp8.dense,
            8.002,
            ranks=(2,),
        ),
        "fp8-tensor": Case(fp8.checkpoint(fp8.whole, "weight_scale", static=True), fp8.dense, 8),
        "ct-int4-g128": Case(
            compressed.checkpoint(CT_INT4, torch.bfloat16), compressed.dense_of(CT_INT4), 4 + 16 / 128 + 4 / 128
        ),
        "ct-int8-channel": Case(
            compressed.checkpoint(CT_INT8, torch.float32), compressed.dense_of(CT_INT8), 8 + 32 / 512
        ),
        "ct-float8-channel": Case(
            compressed.checkpoint(CT_FLOAT8, torch.bfloat16), compressed.dense_of(CT_FLOAT8), 8 + 16 / 512
        ),
        "gptq-4bit-g128": Case(gptq.checkpoint(Rounding(4, 128, symmetric=True)), expected_weights, 4.156),
        "gptq-4bit-g32-desc_act": Case(
            gptq.checkpoint(Rounding(4, 32, symmetric=True, shuffled=True)), expected_weights, 4.698, ranks=()
        ),
        "gptq-8bit-g64-asym": Case(
            gptq.checkpoint(Rounding(8, 64, symmetric=False)), expected_weights, 8.375, ranks=(2,)
        ),
        "gptq-4bit-row": Case(
            gptq.checkpoint(Rounding(4, -1, symmetric=False), "gptq_v2", desc_act=True),
            expected_weights,
            4.039,
            ranks=(4,),
        ),
        "awq-g128": Case(awq.checkpoint(128), expected_weights, 4.156),
        "gguf-q4_0": Case(gguf.in_blocks(Kind.Q4_0), gguf.dense_of_blocks, 4.5, suffix=".gguf"),
        "gguf-q4_1": Case(gguf.in_blocks(Kind.Q4_1, ends=Kind.Q8_0), gguf.dense_of_blocks, 5.0, suffix=".gguf"),
        "gguf-q8_0": Case(gguf.in_blocks(Kind.Q8_0, ends=Kind.Q8_0), gguf.dense_of_blocks, 8.5, suffix=".gguf"),
        # 12.5 % of the weights in 6.56 bits
        "gguf-q4_k": Case(gguf.in_k_quants, gguf.dense_of_blocks, 4.758, ranks=(2,), suffix=".gguf"),
        "bnb-int8": Case(bnb.in_8_bits, bnb.dense_of_8_bits, 8.06),
        "nf4-at-load": Case(at_load.left_dense, at_load.in_4_bits("nf4"), 4.5, quantization="nf4"),
        "fp4-at-load": Case(at_load.left_dense, at_load.in_4_bits("fp4"), 4.5, quantization="fp4"),
        "int8-at-load": Case(at_load.left_dense, at_load.in_int8, 8.06, quantization="int8"),
        "fp8-at-load": Case(at_load.left_dense, at_load.in_fp8, 8.06, quantization="fp8"),
    }
)


def dense_base(root: Path) -> Path:
    """The checkpoint that all are made from."""
    return tiny_checkpoint(root, "llama", **DIMENSIONS)


def quantized(root: Path, name: str, base: Path | None = None) -> Path:
    """The checkpoint of a case, made once below ``root``; of ``dense_base``, unless another one there is given."""
    base = base or dense_base(root)
    path = root / f"{base.name}-{name}{CASES[name].suffix}"
    if not path.exists():
        CASES[name].make(base, path)
    return path


def dequantized(root: Path, name: str, base: Path | None = None) -> Path:
    """A dense checkpoint of the weights that a case's library has for it, made once below ``root``."""
    base = base or dense_base(root)
    path = root / f"{base.name}-{name}-dense"
    if not path.exists():
        shutil.copytree(base, path)
        tensors = load_file(path / "model.safetensors")
        dense = CASES[name].dense(quantized(root, name, base))
        tensors.update({f"{module}.weight": weight for module, weight in dense.items()})
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, path / "model.safetensors", {"format": "pt"}
        )
    return path


def configure(checkpoint: Path, **values: object) -> None:
    """Set keys of config.json."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
