"""Tile sizes of quantized products on a device, and how K is split. Knows no tensor library and no kernel.

Kernels walk rows of codes (``packing.py``) by *units*: 16 bytes of 4 or 8 bits, a run of 48 bytes of 6. A unit's 16
lanes hold *pieces* of 16 neighbouring columns each: two of 4 bits, 32 columns apart; four of 6 bits; one of 8. Nothing
is moved between lanes: each piece is multiplied by its own columns of x.

A product of few rows is split over K: each split leaves its sums in a plane of its own, and whichever program is last
at a column tile adds the planes up, always in their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from loraplex_kernels.quant.packing import RUN

#: programs that fill a large GPU: three on each of 132 multiprocessors
PROGRAMS: Final = 396
#: words of a nested part, int32: its first block, blocks of a row, its first outer scale, the offset's bits
PLACE_WORDS: Final = 4


@dataclass(frozen=True, slots=True)
class Codes:
    """What of a scheme decides how K is cut: bits, and columns that share a scale."""

    bits: int
    group: int


@dataclass(frozen=True, slots=True)
class Form:
    """Tile sizes and launch constants of a product, for steps of some rows."""

    block_m: int
    """Rows of x of a tile; all of a step's but in the last form."""
    block_n: int
    """Rows of the matrix of a tile; a column tile of y never crosses a part."""
    units: int
    """Units of a row that a program decodes at a time, of 4 or 8 bits."""
    max_splits: int
    """Most planes; a power of two."""
    fewest_tiles: int
    """Fewest K tiles of a split: each asks for the codes of the next before it multiplies, and the first one waits."""
    warps: int
    programs_per_sm: int
    registers: int
    """What the compiler may give each thread, for elements of 2 bytes."""

    def resident(self, itemsize: int) -> tuple[int, int]:
        """Programs on each multiprocessor and registers of a thread, as ``lora/device_layout.py`` has them."""
        wide = itemsize // 2
        return max(1, self.programs_per_sm // wide), min(255, self.registers * wide)

    def units_of(self, codes: Codes) -> int:
        """Units of a K tile: fewer where each piece has scales of its own, which take registers."""
        if codes.bits == 6:
            return min(2, self.units)
        return self.units // 2 if codes.bits == 4 and codes.group % RUN else self.units

    def block_k(self, codes: Codes) -> int:
        """Columns of a K tile."""
        return self.units_of(codes) * unit_columns(codes.bits)

    def chunk(self, part_sizes: tuple[int, ...], in_features: int, codes: Codes) -> int:
        """Columns of a split: depends on the matrix alone, and so does the order of sums."""
        block_k = self.block_k(codes)
        k_tiles = max(1, -(-in_features // block_k))
        most = min(self.max_splits, k_tiles // self.fewest_tiles, PROGRAMS // len(self.columns(part_sizes)))
        return -(-k_tiles // max(1, most)) * block_k

    def splits(self, part_sizes: tuple[int, ...], in_features: int, codes: Codes) -> int:
        """Planes of a product."""
        return max(1, -(-in_features // self.chunk(part_sizes, in_features, codes)))

    def columns(self, part_sizes: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
        """The column tiles of y: part, first column in the part, first column in y, the part's columns."""
        tiles, start = [], 0
        for part, size in enumerate(part_sizes):
            tiles += [(part, first, start + first, size) for first in range(0, size, self.block_n)]
            start += size
        return tiles


def unit_columns(bits: int) -> int:
    """Columns of a unit."""
    return RUN if bits == 6 else 128 // bits


@dataclass(frozen=True, slots=True)
class Forms:
    """By the rows of a step, fewest first; the last one tiles them."""

    all: tuple[Form, ...]

    def of(self, num_rows: int) -> Form:
        """By the rows of the step alone: a captured graph keeps its form."""
        return next((form for form in self.all if num_rows <= form.block_m), self.all[-1])


FORMS: Final = Forms(
    (
        # Codes are read once, whatever the rows. A program asks for the next 8 KB of them before it waits for these:
        # three keep 24 KB and more on their way to each multiprocessor, as latency x bandwidth (23 KB) calls for.
        Form(block_m=16, block_n=64, units=8, max_splits=8, fewest_tiles=4, warps=4, programs_per_sm=3, registers=168),
        Form(block_m=32, block_n=64, units=4, max_splits=4, fewest_tiles=4, warps=4, programs_per_sm=3, registers=168),
        Form(block_m=64, block_n=64, units=4, max_splits=2, fewest_tiles=4, warps=8, programs_per_sm=2, registers=128),
        # Prompts: a decoded tile serves 128 rows. One of 128 x 128 sums would spill.
        Form(block_m=128, block_n=64, units=4, max_splits=1, fewest_tiles=4, warps=8, programs_per_sm=1, registers=255),
    )
)
