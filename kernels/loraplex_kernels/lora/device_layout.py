"""How the device op's memory is laid out, and the constants of its kernels. Knows no tensor library and no kernel.

A *root* per table, int64: the address of its slot rows, how many there are. The kernels of a backend share a *header*,
int64: the address of the scratch for h, the elements of one of its rows, the address of the counters. Both never move,
so that a captured launch reads what is true when it is replayed.

A slot row, int64: ``SLOT_WORDS`` (address of the stacked A, its ranks, address of in_scale), then ``PART_WORDS`` for
each part (address of B transposed, its first rank in A, its ranks, address of out_scale, address of shift). Address 0
means absent.

A step's metadata, int32: ``COUNT_WORDS`` (row tiles, pairs, the word at which pairs begin, rows of h, row tiles and
gaps), then ``TILE_WORDS`` for each row tile (first row, rows, first pair, pairs), gaps after them (rows of no segment:
only ``scale_input`` visits those), then ``PAIR_WORDS`` for each pair of a tile and one of its terms (first row, rows,
slot, weight as float bits, its first row of h).

h has one plane for each split of K, all of a step's rows in each, float32.
"""

from __future__ import annotations

from dataclasses import dataclass

SLOT_WORDS = 3
PART_WORDS = 5
COUNT_WORDS = 8
TILE_WORDS = 4
PAIR_WORDS = 8
#: of a column tile, int32: part, first column in the part, first column in y, the part's columns
COLUMN_WORDS = 4
HEADER_WORDS = 3
ROOT_WORDS = 2
#: every tensor of a slot begins at a multiple of this, so that kernels load 16 bytes a thread
ALIGNMENT = 16

#: a step of at most so many rows has the decode form, and of at most so many the wide one
DECODE_ROWS = 32
WIDE_ROWS = 256


@dataclass(frozen=True, slots=True)
class Form:
    """Tile sizes and launch constants of the kernels. Powers of two, at least 16 where a matrix instruction reads."""

    block_m: int
    """Rows of a row tile; a tile never crosses a segment."""
    block_r: int
    """Rows of the stacked A that a shrink item multiplies at a time."""
    block_k: int
    """Columns of x that a shrink item holds at a time."""
    block_n: int
    """Columns of y of an expand item; a column tile never crosses a part."""
    block_c: int
    """Ranks that an expand item multiplies at a time."""
    ahead: bool
    """Whether an expand item asks for B before it waits for h and for the next ranks of B before it multiplies: worth
    its registers where an item waits more than it multiplies."""
    split_k: int
    """Fewest columns of x of one shrink item, a multiple of block_k."""
    max_splits: int
    """Most planes of h: each costs an expand item one more read."""
    max_lanes: int
    """Most programs that share the rank tiles of one pair and split."""
    warps: int
    stages: int
    programs_per_sm: int
    """Programs of one launch on each multiprocessor, for elements of 2 bytes."""
    registers: int
    """What the compiler may give each thread, for elements of 2 bytes."""

    def resident(self, itemsize: int) -> tuple[int, int]:
        """Programs on each multiprocessor and registers of a thread: elements of 4 bytes need twice of both memories.

        All programs of a fused launch must be resident at once, whatever else the card is: ``warps * 32 * registers *
        programs`` is at most 65536, the registers of every multiprocessor since Volta, and the kernels' shared memory
        (a test compiles them and looks) times ``programs`` at most 99 KiB, the least of those since Ampere.
        """
        wide = itemsize // 2
        return max(1, self.programs_per_sm // wide), min(255, self.registers * wide)

    def chunk(self, in_features: int) -> int:
        """Columns of x of one split: depends on the table alone, and so does the order of sums."""
        splits = min(self.max_splits, -(-in_features // self.split_k))
        return -(-in_features // (splits * self.block_k)) * self.block_k

    def splits(self, in_features: int) -> int:
        """Planes of h."""
        return -(-in_features // self.chunk(in_features))

    def columns(self, part_sizes: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
        """The column tiles of a table, ``COLUMN_WORDS`` each."""
        tiles, start = [], 0
        for part, size in enumerate(part_sizes):
            tiles += [(part, first, start + first, size) for first in range(0, size, self.block_n)]
            start += size
        return tiles


@dataclass(frozen=True, slots=True)
class Forms:
    """A form for steps of few rows, where bytes and latency count; one for batches of many decodes, where adapters have
    rows enough to share tiles; and one for prompts, where tiles are reused most."""

    decode: Form
    wide: Form
    prefill: Form

    def of(self, num_rows: int) -> Form:
        """By the rows of the step, not by its segments: a captured graph keeps its form whatever adapters it runs."""
        if num_rows <= DECODE_ROWS:
            return self.decode
        return self.wide if num_rows <= WIDE_ROWS else self.prefill


FORMS = Forms(
    # Little's law: 4.3 TB/s x 0.7 us of latency are 3 MB in flight, 23 KB on each of 132 multiprocessors. A program
    # holds two stages of 8 KB of A (shrink) or 8 KB of B (expand), and four programs fit by their registers.
    decode=Form(
        block_m=16,
        block_r=16,
        block_k=256,
        block_n=128,
        block_c=32,
        ahead=True,
        split_k=512,
        max_splits=16,
        max_lanes=16,
        warps=4,
        stages=2,
        programs_per_sm=4,
        registers=128,
    ),
    # By the byte model (docs/GPU.md): with 128 rows of one adapter the decode form reads more sums and factors through
    # the cache than the usual design; taller tiles, 32 ranks a tile and half the planes or fewer bring that below it.
    wide=Form(
        block_m=32,
        block_r=32,
        block_k=128,
        block_n=128,
        block_c=32,
        ahead=False,
        split_k=1024,
        max_splits=4,
        max_lanes=16,
        warps=8,
        stages=3,
        programs_per_sm=2,
        registers=128,
    ),
    # 64 rows fill a warpgroup's matrix instruction; 8 warps keep the 64 x 128 sums in registers without spilling.
    prefill=Form(
        block_m=64,
        block_r=32,
        block_k=64,
        block_n=128,
        block_c=32,
        ahead=False,
        split_k=1024,
        max_splits=4,
        max_lanes=8,
        warps=8,
        stages=3,
        programs_per_sm=2,
        registers=128,
    ),
)
