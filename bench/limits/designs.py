"""What each design reads, writes and launches for one packed layer in one decode step.

A design is a function from (layer, batch) to launches. Every constant of a design is a field of it. Factors come from
device memory once a launch; what a second row tile reads of them, and all activations, are in the second-level cache:
x was read by the base product a moment ago, y was written by it, and the sums between shrink and expand are new.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from bench.limits.batch import AdapterRows, Batch
from bench.limits.shapes import ELEMENT_BYTES, SUM_BYTES, PackedLayer

#: one entry of a table of addresses: where a slot's factors lie
ADDRESS_BYTES = 8
#: one entry of the step's list of row tiles: first row, rows, slot, weight
TILE_BYTES = 16


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one or several launches."""

    dram_bytes: int = 0
    l2_bytes: int = 0
    """Moved between the second-level cache and the processors, over and above what came from device memory."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.dram_bytes + other.dram_bytes, self.l2_bytes + other.l2_bytes)


class Design(Protocol):
    """One way to add many adapters' products to a packed layer's output."""

    @property
    def name(self) -> str: ...

    def launches(self, layer: PackedLayer, batch: Batch) -> tuple[Traffic, ...]:
        """One entry for each captured node, in order; empty when the step's graph has none."""
        ...

    def per_step(self, batch: Batch) -> tuple[Traffic, ...]:
        """Nodes of the whole step, whatever the number of layers."""
        ...


@dataclass(frozen=True, slots=True)
class Least:
    """No design: each factor of each adapter read once, at its true rank. Nothing can be below."""

    name: str = "least"

    def launches(self, layer: PackedLayer, batch: Batch) -> tuple[Traffic, ...]:
        return (Traffic(sum(layer.a_bytes(a.rank) + layer.b_bytes(a.rank) for a in batch.adapters)),)

    def per_step(self, batch: Batch) -> tuple[Traffic, ...]:
        del batch
        return ()


@dataclass(frozen=True, slots=True)
class Segmented:
    """Ours: true ranks found through a table of addresses, parts stacked, split-K planes, no atomics.

    ``fused``: shrink and expand tiles in one launch, the latter waiting on a counter of the former.
    """

    name: str
    fused: bool
    row_block: int = 16
    rank_block: int = 16
    """Ranks of all parts, stacked, that one shrink tile sums; each tile reads its rows of x again."""
    split_columns: int = 512
    """Fewest columns of x that one shrink tile sums; each split writes its own plane of sums."""
    max_splits: int = 16
    split_unit: int = 256
    """Splits are multiples of it."""
    column_block: int = 128
    """Columns of y that one expand tile writes; each tile reads the planes of its rows again."""
    summed_once: bool = False
    """The last shrink tile of its rows sums the planes, in order, into one that expand reads."""

    def launches(self, layer: PackedLayer, batch: Batch) -> tuple[Traffic, ...]:
        if not batch.adapters:
            return ()
        shrink = _total(self._shrink(layer, adapter) for adapter in batch.adapters)
        expand = _total(self._expand(layer, adapter) for adapter in batch.adapters)
        return (shrink + expand,) if self.fused else (shrink, expand)

    def per_step(self, batch: Batch) -> tuple[Traffic, ...]:
        """The step's one upload of metadata, for all tables."""
        if not batch.adapters:
            return ()
        return (Traffic(l2_bytes=TILE_BYTES * sum(_tiles(a.rows, self.row_block) for a in batch.adapters)),)

    def _shrink(self, layer: PackedLayer, adapter: AdapterRows) -> Traffic:
        a_bytes = layer.a_bytes(adapter.rank)
        again = (_tiles(adapter.rows, self.row_block) - 1) * a_bytes
        rank_tiles = _tiles(layer.num_parts * adapter.rank, self.rank_block)
        x_bytes = rank_tiles * adapter.rows * layer.in_features * ELEMENT_BYTES
        plane = layer.num_parts * adapter.rows * adapter.rank * SUM_BYTES
        planes = self.splits(layer.in_features) * plane
        if self.summed_once:
            planes = 2 * planes + plane
        return Traffic(a_bytes + ADDRESS_BYTES, again + x_bytes + planes)

    def _expand(self, layer: PackedLayer, adapter: AdapterRows) -> Traffic:
        b_bytes = layer.b_bytes(adapter.rank)
        again = (_tiles(adapter.rows, self.row_block) - 1) * b_bytes
        column_tiles = sum(_tiles(size, self.column_block) for size in layer.part_sizes)
        planes_read = 1 if self.summed_once else self.splits(layer.in_features)
        sums = column_tiles * planes_read * adapter.rows * adapter.rank * SUM_BYTES
        return Traffic(b_bytes + ADDRESS_BYTES, again + sums + _read_modify_write(layer, adapter.rows))

    def splits(self, in_features: int) -> int:
        """Fixed by the layer alone, so that a row's result does not depend on the batch it is in."""
        wanted = min(self.max_splits, _tiles(in_features, self.split_columns))
        return _tiles(in_features, _tiles(in_features, wanted * self.split_unit) * self.split_unit)


@dataclass(frozen=True, slots=True)
class BySize:
    """Ours as built: tiles by the rows of the step, ``few`` up to ``few_rows`` of them, ``many`` above."""

    few: Segmented
    many: Segmented
    few_rows: int = 32

    @property
    def name(self) -> str:
        return self.few.name

    def launches(self, layer: PackedLayer, batch: Batch) -> tuple[Traffic, ...]:
        return self.of(batch).launches(layer, batch)

    def per_step(self, batch: Batch) -> tuple[Traffic, ...]:
        return self.of(batch).per_step(batch)

    def of(self, batch: Batch) -> Segmented:
        """The tiles that a batch gets."""
        return self.few if batch.rows <= self.few_rows else self.many


@dataclass(frozen=True, slots=True)
class Usual:
    """What peers do: zero a buffer, shrink into it with float32 atomics over split-K, expand; one rank for all.

    The nodes, the blocks and the splits are vLLM's (punica_gpu.py, lora_shrink_op.py and its defaults without a tuned
    file), counted kindly: splits past the end of K add nothing, and what is in no graph (its metadata) is free but for
    one copy.
    """

    name: str
    max_rank: int | None
    """The server's ``max_lora_rank``, to which every adapter is padded; None: the largest rank of the batch."""
    row_block_shrink: int = 32
    row_block_expand: int = 64
    rank_block: int = 16
    """Ranks that one shrink tile sums; each tile reads its rows of x again."""
    column_block: int = 128

    def launches(self, layer: PackedLayer, batch: Batch) -> tuple[Traffic, ...]:
        if not batch.adapters:
            return ()
        rank = self.padded_rank(batch)
        zero = Traffic(l2_bytes=layer.num_parts * batch.rows * rank * SUM_BYTES)
        shrink = _total(self._shrink(layer, adapter.rows, rank, batch.rows) for adapter in batch.adapters)
        expand = _total(self._expand(layer, adapter.rows, rank) for adapter in batch.adapters)
        return zero, shrink, expand

    def per_step(self, batch: Batch) -> tuple[Traffic, ...]:
        return (Traffic(l2_bytes=TILE_BYTES * batch.rows),) if batch.adapters else ()

    def padded_rank(self, batch: Batch) -> int:
        """The rank that every adapter of the batch is read at. Raises ValueError when the server is set below it."""
        rank = self.max_rank or batch.max_rank
        if rank < batch.max_rank:
            raise ValueError(f"max_lora_rank {rank} is below the batch's largest rank {batch.max_rank}")
        return rank

    def _shrink(self, layer: PackedLayer, rows: int, rank: int, batch_rows: int) -> Traffic:
        # Short batches are split 64 ways in blocks of 256 columns, long ones 8 ways.
        splits = min(64, _tiles(layer.in_features, 256)) if batch_rows < 128 else 8
        a_bytes = layer.a_bytes(rank)
        again = (_tiles(rows, self.row_block_shrink) - 1) * a_bytes
        x_bytes = layer.num_parts * _tiles(rank, self.rank_block) * rows * layer.in_features * ELEMENT_BYTES
        atomics = 2 * splits * layer.num_parts * rows * rank * SUM_BYTES
        return Traffic(a_bytes, again + x_bytes + atomics)

    def _expand(self, layer: PackedLayer, rows: int, rank: int) -> Traffic:
        b_bytes = layer.b_bytes(rank)
        again = (_tiles(rows, self.row_block_expand) - 1) * b_bytes
        column_tiles = sum(_tiles(size, self.column_block) for size in layer.part_sizes)
        sums = column_tiles * rows * rank * SUM_BYTES
        return Traffic(b_bytes, again + sums + _read_modify_write(layer, rows))


#: the largest rank of the grid: a server that holds one such adapter pads all others to it
GRID_MAX_RANK = 64
LEAST = Least()
FEW_ROWS = Segmented("triton", fused=False)
MANY_ROWS = replace(FEW_ROWS, row_block=32, rank_block=32, split_columns=1024, max_splits=4, split_unit=128)
TWO_LAUNCHES = BySize(FEW_ROWS, MANY_ROWS)
FUSED = BySize(replace(FEW_ROWS, name="triton-fused", fused=True), replace(MANY_ROWS, name="triton-fused", fused=True))
USUAL = Usual("usual", max_rank=None)
USUAL_PADDED = Usual(f"usual, padded to {GRID_MAX_RANK}", max_rank=GRID_MAX_RANK)
DESIGNS: tuple[Design, ...] = (LEAST, FUSED, TWO_LAUNCHES, USUAL, USUAL_PADDED)


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _read_modify_write(layer: PackedLayer, rows: int) -> int:
    return 2 * rows * layer.out_features * ELEMENT_BYTES


def _total(traffics: Iterable[Traffic]) -> Traffic:
    total = Traffic()
    for traffic in traffics:
        total += traffic
    return total
