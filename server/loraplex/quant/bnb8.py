"""bitsandbytes in 8 bits: int8 codes with one scale a row, the row's largest magnitude.

::

    <name>.weight           int8 [out, in]         w = weight * SCB * (1 / 127), in float32
    <name>.SCB              float32 [out]
    <name>.weight_format    uint8, one number: 0, by rows; may be missing

Served weight-only: inputs stay as they are. bitsandbytes multiplies by the same weights, but rounds inputs to int8,
each row by its largest magnitude, save columns with an outlier (LLM.int8()): by 1/254 of it at most. So its logits
differ from ours by what comes of that rounding, and ``llm_int8_threshold`` has no meaning here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.errors import InvalidModel, UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.quant.base import Expected, Grain, Matrix, Slab, WeightReader
from loraplex_kernels.quant.packing import pack, row_bytes, unpack
from loraplex_kernels.quant.stored import PlainScales, Scheme, StoredMatrix
from loraplex_kernels.quant.values import Values

#: codes of a row times its largest magnitude, times this; the number that bitsandbytes has for 1 / 127
SCHEME: Final = Scheme(Values.INT8, 0, factor=7.874015718698502e-3)
#: what weight_format may say, and what it would mean; bitsandbytes writes the first alone since 0.38
_LAYOUTS: Final = ("row", "col32", "col_turing", "col_ampere")


def read_config(config: ConfigFields) -> Bnb8Format | None:
    """The format of a ``quantization_config`` with load_in_8bit."""
    if not config.flag("load_in_8bit", False):
        return None
    if config.flag("llm_int8_has_fp16_weight", False):
        raise UnsupportedFeature(
            "quantization_config.llm_int8_has_fp16_weight true keeps weights in 16 bits and rounds them for each "
            "product; supported is false"
        )
    return Bnb8Format()


@dataclass(frozen=True, slots=True)
class Bnb8Format:
    """int8 by rows (``QuantFormat``)."""

    @property
    def name(self) -> str:
        return "bitsandbytes-int8"

    def holds(self, matrix: Matrix, keys: frozenset[str]) -> bool:
        # either beside the codes is enough: what else is missing is then named
        return f"{matrix.name}.SCB" in keys or f"{matrix.name}.weight_format" in keys

    def tensors(self, matrix: Matrix, keys: frozenset[str]) -> Mapping[str, Expected]:
        return {
            matrix.key: Expected((matrix.out_features, matrix.in_features), (torch.int8,)),
            f"{matrix.name}.SCB": Expected((matrix.out_features,), (torch.float32,)),
            f"{matrix.name}.weight_format": Expected((), (torch.uint8,), required=False),
        }

    def check(self, matrix: Matrix, reader: WeightReader) -> None:
        key = f"{matrix.name}.weight_format"
        keys = reader.keys()
        layout = int(reader.tensor(key)) if key in keys else 0
        if layout:
            known = f" ({_LAYOUTS[layout]})" if layout < len(_LAYOUTS) else ""
            raise UnsupportedFeature(f"tensor {key!r} is {layout}{known}, supported is 0 (row)")
        if not bool(torch.isfinite(reader.tensor(f"{matrix.name}.SCB")).all()):
            raise InvalidModel(f"tensor '{matrix.name}.SCB' is not finite everywhere")

    def grain(self, matrix: Matrix) -> Grain:
        return Grain()

    def nbytes(self, matrix: Matrix) -> int | None:
        return None if matrix.end else matrix.out_features * (row_bytes(matrix.in_features, 8) + 4)

    def read(self, reader: WeightReader, slab: Slab) -> StoredMatrix:
        codes = reader.tensor(slab.key, slab.rows, slab.cols)
        scales = reader.tensor(f"{slab.matrix.name}.SCB", slab.rows).unsqueeze(1).clone()
        return StoredMatrix(SCHEME, slab.shape, pack(codes.contiguous().view(torch.uint8), 8), PlainScales(scales))


def written(matrix: Matrix, stored: StoredMatrix) -> dict[str, torch.Tensor]:
    """The tensors that stand for a whole matrix."""
    return {
        matrix.key: unpack(stored.codes, matrix.in_features, 8).view(torch.int8),
        f"{matrix.name}.SCB": stored.scales.tensors[0].flatten(),
        f"{matrix.name}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def written_config(dense: Sequence[str]) -> dict[str, object]:
    """The ``quantization_config`` of a checkpoint that is ``written``, but for the modules ``dense``."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": True,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": list(dense),
    }
