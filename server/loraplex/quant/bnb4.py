"""bitsandbytes in 4 bits: nf4 and fp4 in blocks of 64, their scales plain or quantized once more (double quantization).

A matrix is its codes in one flat run of bytes, two a byte with the first one high, and::

    <name>.weight                                          uint8 [out * in / 2, 1], or the same bytes in another type
    <name>.weight.absmax                                   float32, or uint8 where nested, [out * in / 64]
    <name>.weight.quant_map                                float32 [16]
    <name>.weight.nested_absmax, .nested_quant_map         float32 [ceil(blocks / 256)], [256]
    <name>.weight.quant_state.bitsandbytes__nf4            uint8: JSON of block sizes, dtype, shape, nested_offset

Served as bitsandbytes serves it: weights are rounded to the dtype they were quantized from before the product's own.
Exports are written so too, their scales plain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Final

import torch

from loraplex.errors import InvalidModel, UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.quant.base import Expected, Grain, Matrix, Slab, WeightReader
from loraplex_kernels.quant.packing import pack, unpack
from loraplex_kernels.quant.stored import NESTED_BLOCKS, NestedScales, PlainScales, Scheme, StoredMatrix
from loraplex_kernels.quant.values import TABLES, Values

BLOCK: Final = 64
_STATE: Final = "quant_state.bitsandbytes__"
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: types that ``bnb_4bit_quant_storage`` may give the bytes
_STORAGE: Final = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32)


def read_config(config: ConfigFields) -> Bnb4Format | None:
    """The format of a ``quantization_config`` with load_in_4bit."""
    if not config.flag("load_in_4bit", False):
        return None
    kind = config.text("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        config.refuse("bnb_4bit_quant_type", "nf4 or fp4")
    return Bnb4Format(Values(kind), config.flag("bnb_4bit_use_double_quant", False))


@dataclass(frozen=True, slots=True)
class _State:
    """What the quant_state says."""

    dtype: torch.dtype
    offset: float


@dataclass(frozen=True, slots=True)
class Bnb4Format:
    """nf4 or fp4 (``QuantFormat``). ``nested``: what config.json says of double quantization, for estimates alone."""

    values: Values
    nested: bool

    @property
    def name(self) -> str:
        return f"bitsandbytes-{self.values.value}"

    def holds(self, matrix: Matrix, keys: frozenset[str]) -> bool:
        # an absmax alone is enough: what else is missing is then named
        return f"{matrix.key}.absmax" in keys or self._state_key(matrix) in keys

    def tensors(self, matrix: Matrix, keys: frozenset[str]) -> Mapping[str, Expected]:
        blocks = matrix.out_features * (matrix.in_features // BLOCK)
        key, floats = matrix.key, (torch.float32,)
        expected = {
            key: Expected(None, _STORAGE),
            f"{key}.absmax": Expected((blocks,), floats),
            f"{key}.quant_map": Expected((16,), floats),
            self._state_key(matrix): Expected(None, (torch.uint8,)),
        }
        if f"{key}.nested_absmax" in keys or f"{key}.nested_quant_map" in keys:
            expected[f"{key}.absmax"] = Expected((blocks,), (torch.uint8,))
            expected[f"{key}.nested_absmax"] = Expected((-(-blocks // NESTED_BLOCKS),), floats)
            expected[f"{key}.nested_quant_map"] = Expected((NESTED_BLOCKS,), floats)
        return expected

    def check(self, matrix: Matrix, reader: WeightReader) -> None:
        if matrix.in_features % BLOCK:
            raise UnsupportedFeature(
                f"{matrix.name}: {matrix.in_features} inputs are no multiple of the {BLOCK} of a block of {self.name}"
            )
        stored = reader.shape(matrix.key)
        held = reader.dtype(matrix.key).itemsize
        for size in stored:
            held *= size
        if held * 2 != matrix.out_features * matrix.in_features:
            raise InvalidModel(
                f"tensor {matrix.key!r} has shape {list(stored)} of {reader.dtype(matrix.key)}, which is {held * 2} "
                f"codes; {matrix.out_features} x {matrix.in_features} are called for"
            )
        table = torch.tensor(TABLES[self.values])
        if not torch.equal(reader.tensor(f"{matrix.key}.quant_map"), table):
            raise UnsupportedFeature(f"tensor '{matrix.key}.quant_map' is not the table of {self.values.value}")
        self._state(matrix, reader)

    def grain(self, matrix: Matrix) -> Grain:
        return Grain(cols=BLOCK, why=f"the block of {BLOCK}")

    def nbytes(self, matrix: Matrix) -> int | None:
        if matrix.end:
            return None
        weights = matrix.out_features * matrix.in_features
        return weights // 2 + weights // BLOCK * (1 if self.nested else 4)

    def read(self, reader: WeightReader, slab: Slab) -> StoredMatrix:
        matrix, state = slab.matrix, self._state(slab.matrix, reader)
        flat = reader.tensor(matrix.key).flatten().view(torch.uint8)
        pairs = flat.view(matrix.out_features, -1)[slab.rows, slab.cols.start // 2 : slab.cols.stop // 2]
        codes = torch.stack((pairs >> 4, pairs & 15), 2).flatten(1)
        scheme = Scheme(self.values, BLOCK, rounded=None if state.dtype is torch.float32 else state.dtype)
        return StoredMatrix(scheme, slab.shape, pack(codes, 4), _scales(reader, slab, state.offset))

    def _state_key(self, matrix: Matrix) -> str:
        return f"{matrix.key}.{_STATE}{self.values.value}"

    def _state(self, matrix: Matrix, reader: WeightReader) -> _State:
        key = self._state_key(matrix)
        try:
            state = json.loads(bytes(reader.tensor(key).tolist()))
        except (ValueError, RecursionError) as error:
            raise InvalidModel(f"tensor {key!r} is not JSON: {error}") from error
        if not isinstance(state, dict):
            raise InvalidModel(f"tensor {key!r} is {type(state).__name__} in JSON, expected an object")
        expected: dict[str, tuple[object, ...]] = {
            "quant_type": (self.values.value,),
            "blocksize": (BLOCK,),
            "dtype": tuple(_DTYPES),
            "shape": ([matrix.out_features, matrix.in_features],),
        }
        keys = reader.keys()
        nested = f"{matrix.key}.nested_absmax" in keys
        if nested:
            expected["nested_blocksize"] = (NESTED_BLOCKS,)
        for name, allowed in expected.items():
            if state.get(name) not in allowed:
                raise UnsupportedFeature(
                    f"tensor {key!r}: {name} is {state.get(name)!r}, supported are "
                    f"{', '.join(repr(one) for one in allowed)}"
                )
        offset = state.get("nested_offset", 0.0) if nested else 0.0
        if isinstance(offset, bool) or not isinstance(offset, int | float) or not isfinite(offset):
            raise InvalidModel(f"tensor {key!r}: nested_offset is {offset!r}, expected a finite number")
        return _State(_DTYPES[state["dtype"]], float(offset))


def written(matrix: Matrix, stored: StoredMatrix) -> dict[str, torch.Tensor]:
    """The tensors that stand for a whole matrix in blocks of 64 with plain scales."""
    key, values = matrix.key, stored.scheme.values
    codes = unpack(stored.codes, matrix.in_features, 4)
    dtype = stored.scheme.rounded or torch.float32
    state = {"quant_type": values.value, "blocksize": BLOCK, "dtype": _name(dtype), "shape": list(stored.shape)}
    return {
        key: (codes[:, ::2] << 4 | codes[:, 1::2]).view(-1, 1),
        f"{key}.absmax": stored.scales.tensors[0].flatten(),
        f"{key}.quant_map": torch.tensor(TABLES[values]),
        f"{key}.{_STATE}{values.value}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def written_config(values: Values, dtype: torch.dtype, dense: Sequence[str]) -> dict[str, object]:
    """The ``quantization_config`` of a checkpoint of ``dtype`` that is ``written``, but for the modules ``dense``."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": values.value,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": _name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(dense),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _scales(reader: WeightReader, slab: Slab, offset: float) -> PlainScales | NestedScales:
    key, stride = slab.key, slab.matrix.in_features // BLOCK
    absmax = reader.tensor(f"{key}.absmax").view(-1, stride)
    mine = absmax[slab.rows, slab.cols.start // BLOCK : slab.cols.stop // BLOCK].clone()
    if mine.dtype is not torch.uint8:
        return PlainScales(mine)
    first = slab.rows.start * stride + slab.cols.start // BLOCK
    last = (slab.rows.stop - 1) * stride + (slab.cols.stop - 1) // BLOCK
    # of the outer scales only those of its own blocks
    begin, end = first // NESTED_BLOCKS, last // NESTED_BLOCKS + 1
    outer = reader.tensor(f"{key}.nested_absmax")[begin:end].clone()
    table = reader.tensor(f"{key}.nested_quant_map").clone()
    return NestedScales(mine, table, outer, offset, first - begin * NESTED_BLOCKS, stride)
