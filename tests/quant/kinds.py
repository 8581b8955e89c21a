"""The matrix of adapter kinds over a quantized base. The other side is PEFT on the quantized model where it can be had,
else on a dense one of the same weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from tests.kind_matrix import BASES, STATE_BASES, KindMatrix, Stored
from tests.oracle import fresh
from tests.quant.cases import DIMENSIONS, dequantized, quantized
from tests.quant.packers import bnb
from tests.tiny import tiny_checkpoint

#: a group of 128 columns is the least that all formats can be had with
SMALL: Final = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES: Final[Mapping[str, object]] = MappingProxyType({**DIMENSIONS, **SMALL, "head_dim": 32, "initializer_range": 0.1})
#: recipes that PEFT cannot put on modules of 4 bits; it takes the packed bytes' shape for the matrix's
NOT_ON_4_BITS: Final = ("bdlora", "loha", "lokr", "lokr-both", "lora-saved-linear")
#: cases whose products are the same in their library, and can be had from it in float32
_LIBRARIES: Final[Mapping[str, Callable[[Path], Any]]] = MappingProxyType(
    dict.fromkeys(("nf4", "nf4-nested", "fp4"), bnb.exact_model)
)


#: rows of 64 for blocks of nf4, heads enough for two ranks' words of zeros
STATE_SIZES: Final[Mapping[str, Mapping[str, object]]] = MappingProxyType(
    {
        "mamba2": {"hidden_size": 64, "num_heads": 16, "initializer_range": 0.1},
        "bamba": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "head_dim": 32,
            "mamba_n_heads": 16,
            "initializer_range": 0.1,
        },
    }
)


def state_kinds_on(root: Path, base: str, name: str, among: Collection[str]) -> KindMatrix:
    """Some recipes over a case of ``CASES`` of a base of ``STATE_BASES``; the other side is dense."""
    arch, overrides = STATE_BASES[base]
    made = tiny_checkpoint(root, arch, **{**overrides, **STATE_SIZES[base], "tie_word_embeddings": False})
    served, dense = quantized(root, name, made), dequantized(root, name, made)
    return KindMatrix(root, base, tied=False, stored=Stored(served, dense, lambda recipe: fresh(dense)), among=among)


def kinds_on(root: Path, name: str) -> KindMatrix:
    """The matrix over a case of ``CASES``, biases everywhere."""
    base = tiny_checkpoint(root, "llama", **SIZES, **BASES["llama"])
    served, dense = quantized(root, name, base), dequantized(root, name, base)

    def model(recipe: str) -> Any:
        if name in _LIBRARIES and recipe not in NOT_ON_4_BITS:
            return _LIBRARIES[name](served)
        return fresh(dense)

    return KindMatrix(root, "llama", tied=False, stored=Stored(served, dense, model))
