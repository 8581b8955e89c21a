"""How the attention kernels are cut and compiled for a head dimension, a group and a dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """How the attention kernel is cut: ROWS, TILE and KEYS of it, and how it is compiled."""

    rows: int
    queries: int  # whose group of heads fit in the rows
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of one head dimension, dtype and group."""

    dim: int  # head dimension rounded up to a power of two
    decode: Tile
    chunk: Tile


def tiles_for(head_dim: int, group: int, dtype: torch.dtype) -> Tiles:
    """Tiles that compile for sm_90 without a spilled register for any usual model, by the numbers of ``ptxas -v``.

    Decodes: with five stages two tiles of keys are under way (a page number is loaded two stages before its keys), and
    three programs fit on a multiprocessor at a head dimension of 128: 48 to 96 KB in flight, where 4.3 TB/s with a
    latency of 0.7 us over 132 multiprocessors needs 23. Chunks: 128 rows and 8 warps are two warp groups of wgmma.
    """
    dim = max(16, power_of_two(head_dim))
    rows = max(16, power_of_two(group))
    warps = 4 if rows * dim <= (4096 if dtype == torch.float32 else 8192) else 8
    if dtype == torch.float32:
        few, wide = 32 if dim <= 128 else 16, max(rows, 32)
        decode, chunk = Tile(rows, 1, few, warps, 3), Tile(wide, 0, few, 4 if wide * dim <= 4096 else 8, 3)
    elif dim <= 128:
        decode, chunk = Tile(rows, 1, 64 if dim <= 64 else 32, warps, 5), Tile(max(rows, 128), 0, 64, 8, 3)
    else:
        few = 32 if dim <= 256 else 16
        decode, chunk = Tile(rows, 1, few, warps, 5), Tile(max(rows, 64), 0, few, 8, 3)
    return Tiles(dim, decode, replace(chunk, queries=chunk.rows // group))


def power_of_two(size: int) -> int:
    """The smallest one that is at least ``size``."""
    return 1 << (size - 1).bit_length()
