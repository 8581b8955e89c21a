"""compressed-tensors, as llm-compressor writes it: 4 and 8 bit integers and float8_e4m3fn.

A matrix is stored in the way of the config group that targets it, ``b`` bits a code::

    pack-quantized     <name>.weight_packed        int32 [out, ceil(in * b / 32)], b 4 or 8: q + 2 ** (b - 1), low first
                       <name>.weight_shape         int64 [2]: out, in
                       <name>.weight_zero_point    int32 [ceil(out * b / 32), groups], packed along out; asymmetric
                       <name>.weight_g_idx         int32 [in]: the group of each column; actorder group
    int-quantized      <name>.weight               int8 [out, in]: q
                       <name>.weight_zero_point    int8, as the scales; asymmetric
    float-quantized    <name>.weight               float8_e4m3fn [out, in]
    all                <name>.weight_scale         [1], [out, 1], [out, groups] or [row blocks, column blocks]
                       <name>.input_scale and what else activations and the KV cache have: known, and not used

``w = (q - zero) * scale`` in the dtype of the scales, as the library decompresses. naive-quantized is int-quantized or
float-quantized. Served weight-only: activations stay in the compute dtype whatever ``input_activations`` and
``output_activations`` say, and the KV cache whatever ``kv_cache_scheme`` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Final

import torch

from loraplex.errors import InvalidModel
from loraplex.json_config import ConfigFields
from loraplex.quant.activation_scales import activation_tensors, check_activation_tensors
from loraplex.quant.base import Expected, Grain, Matrix, Slab, WeightReader
from loraplex.quant.compressed_groups import Group, Groups, read_groups
from loraplex.quant.float8 import check_codes, expected_codes, read_codes
from loraplex.quant.groups import WORD_BITS, unpack_words
from loraplex.quant.scale_grid import SCALE_TYPES
from loraplex_kernels.quant.packing import pack
from loraplex_kernels.quant.stored import PlainScales, Scheme, StoredMatrix
from loraplex_kernels.quant.values import Values

#: what 4 bits, and 8, are stored above
_ZERO_OF_4: Final = 8
_SIGN: Final = 0x80
#: of scales, for estimates
_SCALE_BYTES: Final = 2
_PARTS: Final = ("weight_packed", "weight_scale", "weight_shape")
#: what has one number where one rectangle is all of a matrix
_SINGLE: Final = (".weight_scale", ".weight_zero_point")


def read_config(config: ConfigFields) -> CompressedTensorsFormat:
    """The format of a ``quantization_config`` whose quant_method is compressed-tensors."""
    return CompressedTensorsFormat(read_groups(config))


@dataclass(frozen=True, slots=True)
class CompressedTensorsFormat:
    """What config groups say of each matrix (``QuantFormat``)."""

    groups: Groups

    @property
    def name(self) -> str:
        labels = dict.fromkeys(group.label for group in self.groups.groups)
        return "-".join(("compressed-tensors", *labels))

    def holds(self, matrix: Matrix, keys: frozenset[str]) -> bool:
        return any(f"{matrix.name}.{part}" in keys for part in _PARTS)

    def tensors(self, matrix: Matrix, keys: frozenset[str]) -> Mapping[str, Expected]:
        group, name = self._group(matrix), matrix.name
        grid = group.grid.shape(matrix)
        expected = {f"{name}.weight_scale": Expected(None if grid == (1, 1) else grid, SCALE_TYPES)}
        if group.floating:
            expected[matrix.key] = expected_codes(matrix)
        elif group.packed:
            words = _words(matrix.in_features, group.bits)
            expected[f"{name}.weight_packed"] = Expected((matrix.out_features, words), (torch.int32,))
            expected[f"{name}.weight_shape"] = Expected((2,), (torch.int64, torch.int32))
        else:
            expected[matrix.key] = Expected((matrix.out_features, matrix.in_features), (torch.int8,))
        if not group.symmetric and group.packed:
            words = _words(matrix.out_features, group.bits)
            expected[f"{name}.weight_zero_point"] = Expected((words, grid[1]), (torch.int32,))
        elif not group.symmetric:
            expected[f"{name}.weight_zero_point"] = Expected(None if grid == (1, 1) else grid, (torch.int8,))
        if group.ordered:
            expected[f"{name}.weight_g_idx"] = Expected((matrix.in_features,), (torch.int32,))
        return expected | activation_tensors(matrix)

    def check(self, matrix: Matrix, reader: WeightReader) -> None:
        group, name = self._group(matrix), matrix.name
        size = group.grid.cols
        if size and group.grid.rows == 1 and matrix.in_features % size:
            raise InvalidModel(f"{name}: {matrix.in_features} inputs are no multiple of group_size {size}")
        if group.floating:
            check_codes(matrix, reader)
        if group.packed:
            shape = reader.tensor(f"{name}.weight_shape").tolist()
            if shape != [matrix.out_features, matrix.in_features]:
                raise InvalidModel(
                    f"tensor '{name}.weight_shape' is {shape}, expected [{matrix.out_features}, {matrix.in_features}]"
                )
        if group.grid.shape(matrix) == (1, 1):
            for key in self.tensors(matrix, reader.keys()):
                if key.endswith(_SINGLE) and prod(reader.shape(key)) != 1:
                    raise InvalidModel(f"tensor {key!r} has shape {list(reader.shape(key))}, expected one number")
        if group.ordered:
            _order(matrix, group, reader)
        check_activation_tensors(matrix, reader)

    def grain(self, matrix: Matrix) -> Grain:
        group = self.groups.of(matrix)
        if group is None:
            return Grain()
        if group.ordered:
            return Grain(1, matrix.in_features, "weight_g_idx")
        rows, cols = group.grid.group_rows, group.grid.cols or (WORD_BITS // group.bits if group.packed else 1)
        return Grain(rows, cols, f"the {group.grid.label}" if group.grid.cols else "an int32 of codes")

    def nbytes(self, matrix: Matrix) -> int | None:
        group = self.groups.of(matrix)
        if group is None:
            return None
        code_bits = group.bits if group.packed else 8
        held = _SCALE_BYTES if group.symmetric else _SCALE_BYTES + 1
        return matrix.out_features * matrix.in_features * code_bits // 8 + group.grid.held(matrix) * held

    def read(self, reader: WeightReader, slab: Slab) -> StoredMatrix:
        matrix = slab.matrix
        group, key = self._group(matrix), f"{matrix.name}.weight_scale"
        scales = group.grid.scales(reader.tensor(key), slab, key)
        order = _order(matrix, group, reader) if group.ordered else None
        codes = (
            read_codes(reader, slab) if group.floating else pack(_integers(reader, slab, group, order), _width(group))
        )
        values = _values(group)
        scheme = Scheme(
            values,
            group.grid.cols,
            group.grid.group_rows,
            zero=_ZERO_OF_4 if values is Values.UINT4 and group.symmetric else 0,
            rounded=None if scales.dtype is torch.float32 else scales.dtype,
        )
        zeros = None if group.symmetric else _zeros(reader, slab, group)
        return StoredMatrix(scheme, slab.shape, codes, PlainScales(scales, zeros), order)

    def _group(self, matrix: Matrix) -> Group:
        group = self.groups.of(matrix)
        if group is None:
            raise InvalidModel(
                f"{matrix.name} is stored quantized, but no target of quantization_config.config_groups is its, or "
                f"quantization_config.ignore is"
            )
        return group


def _width(group: Group) -> int:
    """Bits of a code in memory."""
    return group.bits if group.packed else 8


def _values(group: Group) -> Values:
    if group.floating:
        return Values.E4M3
    if _width(group) == 4:
        return Values.UINT4
    return Values.INT8 if group.symmetric else Values.UINT8


def _integers(reader: WeightReader, slab: Slab, group: Group, order: torch.Tensor | None) -> torch.Tensor:
    """Codes of the slab as ``_values`` has them, one a byte: uint8 ``[rows, columns]``."""
    if group.packed:
        each, cols = WORD_BITS // group.bits, slab.cols
        first = cols.start // each
        words = reader.tensor(f"{slab.matrix.name}.weight_packed", slab.rows, slice(first, -(-cols.stop // each)))
        codes = unpack_words(words, group.bits)[:, cols.start - first * each : cols.stop - first * each]
    else:
        codes = reader.tensor(slab.key, slab.rows, slab.cols).view(torch.uint8)
    if order is not None:
        assert slab.shape[1] == slab.matrix.in_features
        codes = codes[:, order]
    # packed codes are unsigned, others are signed; so are values with zeros, and those without
    return codes ^ _SIGN if _width(group) == 8 and group.packed == group.symmetric else codes


def _zeros(reader: WeightReader, slab: Slab, group: Group) -> torch.Tensor:
    whole = reader.tensor(f"{slab.matrix.name}.weight_zero_point")
    if group.packed:
        unsigned = unpack_words(whole.T, group.bits)[:, : slab.matrix.out_features].T
    else:
        unsigned = whole.view(torch.uint8) ^ _SIGN
    return group.grid.part(unsigned, slab)


def _order(matrix: Matrix, group: Group, reader: WeightReader) -> torch.Tensor | None:
    """Columns in the order of their groups, int64 ``[in]``; None where they stand in it. -1 says so too.

    Raises InvalidModel: a group has more columns than another.
    """
    key, size = f"{matrix.name}.weight_g_idx", group.grid.cols
    index = reader.tensor(key).long()
    if bool((index == -1).any()):
        return None
    order = torch.argsort(index, stable=True)
    expected = torch.arange(matrix.in_features) // size
    if not torch.equal(index[order], expected):
        raise InvalidModel(
            f"tensor {key!r} does not give each of {matrix.in_features // size} groups the {size} columns of group_size"
        )
    return None if torch.equal(index, expected) else order


def _words(codes: int, bits: int) -> int:
    return -(-codes * bits // WORD_BITS)
