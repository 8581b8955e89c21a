"""The matrix of adapter kinds over a quantized base. The other side is PEFT on the quantized model where it can be had,
else on a dense one of the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from tests.kind_matrix import BASES, KindMatrix, Stored
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


def kinds_on(root: Path, name: str) -> KindMatrix:
    """The matrix over a case of ``CASES``, biases everywhere."""
    base = tiny_checkpoint(root, "llama", **SIZES, **BASES["llama"])
    served, dense = quantized(root, name, base), dequantized(root, name, base)

    def model(recipe: str) -> Any:
        if name in _LIBRARIES and recipe not in NOT_ON_4_BITS:
            return _LIBRARIES[name](served)
        return fresh(dense)

    return KindMatrix(root, "llama", tied=False, stored=Stored(served, dense, model))
