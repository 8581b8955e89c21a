"""GGUF's own blocks: Q4_0, Q4_1, Q8_0, and the K-quants Q4_K and Q6_K, each matrix of a file in a type of its own.

A matrix is the rows of the file as they are, rotary rows back in the checkpoint's order::

    <name>.blocks.Q4_1          uint8 [out, in / 32 * 20]: the bytes of each row's blocks

    Q4_0   32 columns   d, 16 bytes of codes                                 (code - 8) * d
    Q4_1   32 columns   d, m, 16 bytes                                       code * d + m
    Q8_0   32 columns   d, 32 bytes                                          code * d
    Q4_K   256 columns  d, dmin, 12 bytes of scales and mins, 128 bytes      code * (d * scale) - dmin * min, 32 a scale
    Q6_K   256 columns  128 bytes low, 64 high, 16 scales, d                 (code - 32) * (d * scale), 16 a scale

Two codes a byte, d, m and dmin in float16. Scales and mins of Q4_K are 6 bits there and a byte here, which is 2.8 %
more; all else takes what it takes in the file. Weights are those of ``gguf.quants.dequantize``, bit for bit. Products
are weight-only: llama.cpp rounds activations to 8 bits for them, which is not done here.

``quantization_config`` of a GGUF file is ours (``gguf_source``): its main type, and which modules are in which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch

from loraplex.json_config import ConfigFields
from loraplex.quant.base import Expected, Grain, Matrix, Slab, WeightReader
from loraplex_kernels.quant.packing import pack, row_bytes
from loraplex_kernels.quant.stored import PlainScales, Scales, Scheme, StoredMatrix, SuperScales
from loraplex_kernels.quant.values import Values

METHOD: Final = "gguf"


def blocks_key(name: str, kind: str) -> str:
    """Under which name a reader has the blocks of a module: ``<name>.blocks.Q4_1``."""
    return f"{name}.blocks.{kind}"


@dataclass(frozen=True, slots=True)
class BlockType:
    """A block of ``columns``: its bytes in the file, and those of its scales in memory. ``unpack``: bytes of all blocks
    of some rows, uint8 ``[out, blocks, nbytes]`` -> packed codes and scales, in memory of their own."""

    columns: int
    nbytes: int
    scale_bytes: int
    scheme: Scheme
    unpack: Callable[[torch.Tensor], tuple[torch.Tensor, Scales]]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row, or of a part of one, in the file."""
        return columns // self.columns * self.nbytes


def read_config(config: ConfigFields) -> GgufFormat:
    """The format of a ``quantization_config`` that ``config_of`` made."""
    main = config.text("type")
    if main not in BLOCK_TYPES:
        config.refuse("type", ", ".join(BLOCK_TYPES))
    modules = config.section("modules") or ConfigFields({})
    return GgufFormat(main, {name: kind for kind in BLOCK_TYPES for name in modules.texts(kind)})


def config_of(kinds: Mapping[str, str], main: str) -> dict[str, object]:
    """The ``quantization_config`` of modules in these types (module -> type). ``main``: the one that most weights
    have."""
    modules: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        modules.setdefault(kind, []).append(name)
    return {"quant_method": METHOD, "type": main, "modules": modules}


@dataclass(frozen=True, slots=True)
class GgufFormat:
    """The block types of one file (``QuantFormat``). ``kinds``: module -> type; the others are dense."""

    main: str
    kinds: Mapping[str, str]

    @property
    def name(self) -> str:
        return f"{METHOD}-{self.main.lower()}"

    def holds(self, matrix: Matrix, keys: frozenset[str]) -> bool:
        return matrix.name in self.kinds and self._key(matrix) in keys

    def tensors(self, matrix: Matrix, keys: frozenset[str]) -> Mapping[str, Expected]:
        columns = self._block(matrix).row_bytes(matrix.in_features)
        return {self._key(matrix): Expected((matrix.out_features, columns), (torch.uint8,))}

    def check(self, matrix: Matrix, reader: WeightReader) -> None:
        return None  # a block is codes and scales alone, any of which may be

    def grain(self, matrix: Matrix) -> Grain:
        if matrix.name not in self.kinds:
            return Grain()
        columns = self._block(matrix).columns
        return Grain(cols=columns, why=f"the {self.kinds[matrix.name]} block of {columns}")

    def nbytes(self, matrix: Matrix) -> int | None:
        if matrix.name not in self.kinds:
            return None
        block = self._block(matrix)
        codes = row_bytes(matrix.in_features, block.scheme.values.bits)
        return matrix.out_features * (codes + matrix.in_features // block.columns * block.scale_bytes)

    def read(self, reader: WeightReader, slab: Slab) -> StoredMatrix:
        block = self._block(slab.matrix)
        cols = slice(block.row_bytes(slab.cols.start), block.row_bytes(slab.cols.stop))
        rows = reader.tensor(self._key(slab.matrix), slab.rows, cols)
        codes, scales = block.unpack(rows.view(len(rows), -1, block.nbytes))
        return StoredMatrix(block.scheme, slab.shape, codes, scales)

    def _key(self, matrix: Matrix) -> str:
        return blocks_key(matrix.name, self.kinds[matrix.name])

    def _block(self, matrix: Matrix) -> BlockType:
        return BLOCK_TYPES[self.kinds[matrix.name]]


def _q4_0(blocks: torch.Tensor) -> tuple[torch.Tensor, Scales]:
    return _pack4(blocks[:, :, 2:]), PlainScales(_float16(blocks[:, :, :2]))


def _q4_1(blocks: torch.Tensor) -> tuple[torch.Tensor, Scales]:
    return _pack4(blocks[:, :, 4:]), PlainScales(_float16(blocks[:, :, :2]), shifts=_float16(blocks[:, :, 2:4]))


def _q8_0(blocks: torch.Tensor) -> tuple[torch.Tensor, Scales]:
    return pack(blocks[:, :, 2:].flatten(1), 8), PlainScales(_float16(blocks[:, :, :2]))


def _q4_k(blocks: torch.Tensor) -> tuple[torch.Tensor, Scales]:
    # of the 6 bits of scales 4 to 7 and mins 4 to 7 the high two stand above scales 0 to 3 and mins 0 to 3
    low, high, mixed = torch.split(blocks[:, :, 4:16], 4, 2)
    scales = torch.cat((low & 63, mixed & 15 | low >> 2 & 48), 2)
    mins = torch.cat((high & 63, mixed >> 4 | high >> 2 & 48), 2)
    outer, outer_mins = _float16(blocks[:, :, :2]), _float16(blocks[:, :, 2:4])
    # 64 columns lie in 32 bytes as they do in ours
    return _own(blocks[:, :, 16:]), SuperScales(scales.flatten(1), outer, mins.flatten(1), outer_mins)


def _q6_k(blocks: torch.Tensor) -> tuple[torch.Tensor, Scales]:
    grid = blocks.shape[:2]
    lows, highs = blocks[:, :, :128].view(*grid, 2, 64), blocks[:, :, 128:192].view(*grid, 2, 32)
    low = torch.stack((lows & 15, lows >> 4), 3).flatten(1)
    high = torch.stack([highs >> shift & 3 for shift in (0, 2, 4, 6)], 3).flatten(1)
    scales = _own(blocks[:, :, 192:208]).view(torch.int8)
    return pack(low | high << 4, 6), SuperScales(scales, _float16(blocks[:, :, 208:]))


def _pack4(part: torch.Tensor) -> torch.Tensor:
    """Codes of 32 columns in 16 bytes, column j low and 16 + j high -> packed."""
    return pack(torch.cat((part & 15, part >> 4), 2).flatten(1), 4)


def _own(part: torch.Tensor) -> torch.Tensor:
    """Bytes of each block, ``[out, blocks, n]``, in a row of their own: ``[out, blocks * n]``."""
    return part.clone(memory_format=torch.contiguous_format).flatten(1)


def _float16(part: torch.Tensor) -> torch.Tensor:
    """Two bytes of each block -> ``[out, blocks]``."""
    return _own(part).view(torch.float16)


#: by their names in the gguf library
BLOCK_TYPES: Final[Mapping[str, BlockType]] = MappingProxyType(
    {
        "Q4_0": BlockType(32, 18, 2, Scheme(Values.UINT4, 32, zero=8), _q4_0),
        "Q4_1": BlockType(32, 20, 4, Scheme(Values.UINT4, 32), _q4_1),
        "Q8_0": BlockType(32, 34, 2, Scheme(Values.INT8, 32), _q8_0),
        "Q4_K": BlockType(256, 144, 20, Scheme(Values.UINT4, 32), _q4_k),
        "Q6_K": BlockType(256, 210, 18, Scheme(Values.UINT6, 16, zero=32), _q6_k),
    }
)
