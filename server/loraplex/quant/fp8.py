"""FP8 as transformers and vLLM publish it: float8_e4m3fn weights, and scales of blocks, rows or whole matrices.

::

    <name>.weight                      float8_e4m3fn [out, in]
    <name>.weight_scale_inv            [ceil(out / 128), ceil(in / 128)] where weight_block_size is [128, 128]
    <name>.weight_scale                [] or [1], of the whole matrix; [out, 1] or [out], of rows (fbgemm_fp8)
    <name>.input_scale, .activation_scale, and k_scale, v_scale of the cache: known, and not used

``w = code * scale`` by either name, in float32. Served weight-only: activations stay in the compute dtype whatever
``activation_scheme`` says, and so does the KV cache, where vLLM would round both to 8 bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.errors import InvalidModel, UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.quant.activation_scales import activation_tensors, check_activation_tensors
from loraplex.quant.base import Expected, Grain, Matrix, Slab, WeightReader
from loraplex.quant.float8 import check_codes, expected_codes, read_codes
from loraplex.quant.scale_grid import CHANNEL, SCALE_TYPES, STEP_COLUMNS, TENSOR, ScaleGrid
from loraplex_kernels.quant.packing import unpack
from loraplex_kernels.quant.stored import PlainScales, Scheme, StoredMatrix
from loraplex_kernels.quant.values import Values

#: names of the scale below a matrix's own, in the order they are looked for
_SCALES: Final = ("weight_scale_inv", "weight_scale")
_SCALE_BYTES: Final = 4
_SCHEMES: Final = ("dynamic", "static")


def read_config(config: ConfigFields) -> Fp8Format:
    """The format of a ``quantization_config`` whose quant_method is fp8 or fbgemm_fp8."""
    if config.text("activation_scheme", _SCHEMES[0]) not in _SCHEMES:
        config.refuse("activation_scheme", " or ".join(_SCHEMES))
    numbers = config.text("fmt", "e4m3")
    if numbers != "e4m3":
        raise UnsupportedFeature(f"quantization_config.fmt {numbers!r}; supported is 'e4m3'", field="fmt")
    sizes = config.integers("weight_block_size")
    if sizes and len(sizes) != 2:
        config.refuse("weight_block_size", "[rows, columns]")
    if sizes and sizes[1] % STEP_COLUMNS:
        raise UnsupportedFeature(
            f"quantization_config.weight_block_size {list(sizes)}; supported are columns that are a multiple of "
            f"{STEP_COLUMNS}",
            field="weight_block_size",
        )
    skipped = config.texts("modules_to_not_convert") + config.texts("ignored_layers")
    blocks = ScaleGrid(*sizes) if sizes else None
    return Fp8Format(config.text("quant_method", "fp8"), blocks, skipped)


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """FP8 (``QuantFormat``). ``blocks``: of weight_block_size. ``skipped``: patterns of modules said to be dense, for
    estimates and cuts; which are is seen by their tensors."""

    method: str
    blocks: ScaleGrid | None
    skipped: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.method if self.blocks is None else f"{self.method}-{self.blocks.label}"

    def holds(self, matrix: Matrix, keys: frozenset[str]) -> bool:
        return any(f"{matrix.name}.{name}" in keys for name in _SCALES)

    def tensors(self, matrix: Matrix, keys: frozenset[str]) -> Mapping[str, Expected]:
        return {
            matrix.key: expected_codes(matrix),
            self._scale_key(matrix, keys): Expected(None, SCALE_TYPES),
            **activation_tensors(matrix),
        }

    def check(self, matrix: Matrix, reader: WeightReader) -> None:
        check_codes(matrix, reader)
        self._grid(matrix, reader)
        check_activation_tensors(matrix, reader)

    def grain(self, matrix: Matrix) -> Grain:
        if self.blocks is None or self._is_dense(matrix):
            return Grain()
        rows, cols = self.blocks.rows, self.blocks.cols
        return Grain(rows, cols, f"the weight_block_size [{rows}, {cols}]")

    def nbytes(self, matrix: Matrix) -> int | None:
        if self._is_dense(matrix):
            return None
        scales = (self.blocks or TENSOR).held(matrix)
        return matrix.out_features * matrix.in_features + scales * _SCALE_BYTES

    def read(self, reader: WeightReader, slab: Slab) -> StoredMatrix:
        grid, key = self._grid(slab.matrix, reader), self._scale_key(slab.matrix, reader.keys())
        scales = PlainScales(grid.scales(reader.tensor(key), slab, key))
        scheme = Scheme(Values.E4M3, grid.cols, grid.group_rows)
        return StoredMatrix(scheme, slab.shape, read_codes(reader, slab), scales)

    def _is_dense(self, matrix: Matrix) -> bool:
        """Whether it is expected to be, before any tensor has been looked at: transformers' rule for skipped modules,
        and neither library quantizes the ends of the vocabulary unasked."""
        name = matrix.name
        return matrix.end or any(
            name.endswith(pattern) or _compiled(pattern).match(name) is not None for pattern in self.skipped
        )

    def _scale_key(self, matrix: Matrix, keys: frozenset[str]) -> str:
        """The name of its scales; where it has none, the one they should have."""
        names = [f"{matrix.name}.{name}" for name in _SCALES]
        return next((name for name in names if name in keys), names[0 if self.blocks else 1])

    def _grid(self, matrix: Matrix, reader: WeightReader) -> ScaleGrid:
        """What shares a scale, by the shape of the scales."""
        key, rows = self._scale_key(matrix, reader.keys()), matrix.out_features
        grids = {(): TENSOR, (1,): TENSOR, (rows,): CHANNEL, (rows, 1): CHANNEL, (1, 1): TENSOR}
        if self.blocks is not None:
            grids[self.blocks.shape(matrix)] = self.blocks
        shape = reader.shape(key)
        if shape not in grids:
            blocks = "no weight_block_size" if self.blocks is None else f"weight_block_size {self.blocks.label}"
            raise InvalidModel(
                f"tensor {key!r} has shape {list(shape)}, allowed are "
                f"{', '.join(str(list(one)) for one in grids)} ({blocks})"
            )
        return grids[shape]


def written(matrix: Matrix, stored: StoredMatrix) -> dict[str, torch.Tensor]:
    """The tensors that stand for a whole matrix whose scales are those of blocks."""
    return {
        matrix.key: unpack(stored.codes, matrix.in_features, 8).view(torch.float8_e4m3fn),
        f"{matrix.name}.{_SCALES[0]}": stored.scales.tensors[0],
    }


def written_config(scheme: Scheme, dense: Sequence[str]) -> dict[str, object]:
    """The ``quantization_config`` of a checkpoint that is ``written`` in ``scheme``, but for the modules ``dense``."""
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [scheme.group_rows, scheme.group],
        "modules_to_not_convert": list(dense),
    }


def _compiled(pattern: str) -> re.Pattern[str]:
    """The pattern, up to the end of a name between dots; what is no regular expression stands for itself."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    try:
        return re.compile(f"(?:{pattern}){boundary}")
    except re.error:
        return re.compile(f"(?:{re.escape(pattern)}){boundary}")
