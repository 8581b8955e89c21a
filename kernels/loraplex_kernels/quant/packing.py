"""How codes lie in memory: the same for every format, chosen so that vectors decode without moving lanes.

4 bits   32 bytes: byte j holds column j low and column 32 + j high
6 bits   48 bytes: the low four bits as a run of 4 bits, then the high two: byte j holds those of columns j, 16 + j,
         32 + j and 48 + j, from its low end up
8 bits   64 bytes: a byte each

of a run of 64 columns. Rows are padded with zero codes to whole runs.
"""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional as F

#: columns of a run
RUN: Final = 64


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a packed row."""
    return -(-columns // RUN) * RUN * bits // 8


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes ``[out, in]``, one a byte -> ``[out, row_bytes]``, its own memory."""
    rows, columns = codes.shape
    padded = -(-columns // RUN) * RUN
    if padded != columns:
        codes = F.pad(codes, (0, padded - columns))
    if bits == 8:
        return codes.contiguous().clone()
    if bits == 4:
        return _pack4(codes)
    low = _pack4(codes & 15).view(rows, -1, 32)
    high = (codes >> 4).view(rows, -1, 4, 16)
    packed = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return torch.cat((low, packed), 2).view(rows, -1)


def unpack(packed: torch.Tensor, columns: int, bits: int) -> torch.Tensor:
    """``[out, row_bytes]`` -> uint8 codes ``[out, columns]``, one a byte."""
    if bits == 8:
        return packed[:, :columns]
    rows = packed.shape[0]
    if bits == 4:
        return _unpack4(packed)[:, :columns]
    runs = packed.view(rows, packed.shape[1] // 48, 48)
    low = _unpack4(runs[:, :, :32].flatten(1)).view(rows, runs.shape[1], 4, 16)
    high = torch.stack([(runs[:, :, 32:] >> shift) & 3 for shift in (0, 2, 4, 6)], 2)
    return (low | high << 4).view(rows, runs.shape[1] * RUN)[:, :columns]


def _pack4(codes: torch.Tensor) -> torch.Tensor:
    runs = codes.view(codes.shape[0], -1, 2, 32)
    return (runs[:, :, 0] | runs[:, :, 1] << 4).view(codes.shape[0], -1)


def _unpack4(packed: torch.Tensor) -> torch.Tensor:
    halves = packed.view(packed.shape[0], packed.shape[1] // 32, 32)
    return torch.stack((halves & 15, halves >> 4), 2).flatten(1)
