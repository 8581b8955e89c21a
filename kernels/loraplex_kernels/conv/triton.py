"""The causal convolution in Triton: one kernel, for single rows and for tiles of a chunk's rows.

A program computes some rows of one span for a block of channels. States are the business of the program of a span's
first rows alone: it reads the inputs before them, and writes the last inputs after the span's rows and after each save,
which it reads from x. So a span may write the slot that it reads, and no program waits for another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loraplex_kernels import state_records
from loraplex_kernels.conv.device import TILE, DeviceConv, KernelSet
from loraplex_kernels.lora.triton import unfit

FIRST_ROW: tl.constexpr = tl.constexpr(state_records.FIRST_ROW)
NUM_ROWS: tl.constexpr = tl.constexpr(state_records.NUM_ROWS)
SOURCE: tl.constexpr = tl.constexpr(state_records.SOURCE)
SLOT: tl.constexpr = tl.constexpr(state_records.SLOT)
SAVES: tl.constexpr = tl.constexpr(state_records.SAVES)
NUM_SAVES: tl.constexpr = tl.constexpr(state_records.NUM_SAVES)
RECORD: tl.constexpr = tl.constexpr(state_records.RECORD)
SAVE: tl.constexpr = tl.constexpr(state_records.SAVE)
TILE_WORDS: tl.constexpr = tl.constexpr(TILE)


@triton.jit
def silu(value):
    """value * sigmoid(value), without an exponential that overflows."""
    small = tl.exp(-tl.abs(value))
    return value * tl.where(value >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def _inputs(x, history, at, num_rows, known, column, ok, x_stride, BEFORE: tl.constexpr, CHANNELS: tl.constexpr):
    """The inputs at rows ``at`` of a span that x begins at, the BEFORE rows before it too: zeros unless ``known``."""
    own = (at >= 0) & (at < num_rows)
    new = x + (at.to(tl.int64) * x_stride)[:, None] + column[None, :]
    new = tl.load(new, mask=own[:, None] & ok[None, :], other=0.0)
    before = (at < 0) & (at >= -BEFORE) & known
    old = history + ((at + BEFORE) * CHANNELS)[:, None] + column[None, :]
    old = tl.load(old, mask=before[:, None] & ok[None, :], other=0.0)
    return tl.where((at >= 0)[:, None], new, old)


@triton.jit
def _convolve(
    out, x, weight, bias, states, records, tiles, saves, x_stride, weight_stride, bias_stride,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a span, BLOCK channels; ROWS is 1 for the spans of one row, which come first and have no tile."""
    num_blocks = tl.cdiv(CHANNELS, BLOCK)
    item = tl.program_id(0) // num_blocks
    column = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    ok = column < CHANNELS
    if ROWS == 1:
        span = item
        first = 0
    else:
        span = tl.load(tiles + item * TILE_WORDS)
        first = tl.load(tiles + item * TILE_WORDS + 1)
    record = records + span * RECORD
    num_rows = tl.load(record + NUM_ROWS)
    source = tl.load(record + SOURCE).to(tl.int64)
    begin = tl.load(record + FIRST_ROW).to(tl.int64)
    x += begin * x_stride
    size: tl.constexpr = (WIDTH - 1) * CHANNELS
    history = states + tl.maximum(source, 0) * size
    row = first + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    if bias is not None:
        total += tl.load(bias + span.to(tl.int64) * bias_stride + column, mask=ok, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(WIDTH):
        at = row + (tap - WIDTH + 1)
        taken = _inputs(x, history, at, num_rows, source >= 0, column, ok, x_stride, WIDTH - 1, CHANNELS)
        factor = tl.load(weight + span.to(tl.int64) * weight_stride + tap * CHANNELS + column, mask=ok, other=0.0)
        total += factor.to(tl.float32)[None, :] * taken.to(tl.float32)
    live = row < num_rows
    value = tl.where(live[:, None], silu(total), 0.0).to(out.dtype.element_ty)
    stored = ok[None, :] if ROWS == 1 else live[:, None] & ok[None, :]  # a padded row's out is zero
    tl.store(out + ((begin + row) * CHANNELS)[:, None] + column[None, :], value, mask=stored)
    if first == 0:
        kept = tl.arange(0, BEFORE)
        shift = kept - (WIDTH - 1)
        place = kept[:, None] * CHANNELS + column[None, :]
        mask = (kept < WIDTH - 1)[:, None] & ok[None, :]
        first_save = saves + tl.load(record + SAVES) * SAVE
        for index in range(tl.load(record + NUM_SAVES)):
            after = tl.load(first_save + index * SAVE)
            slot = tl.load(first_save + index * SAVE + 1).to(tl.int64)
            last = _inputs(x, history, after + shift, num_rows, source >= 0, column, ok, x_stride, WIDTH - 1, CHANNELS)
            tl.store(states + slot * size + place, last, mask=mask)
        last = _inputs(x, history, num_rows + shift, num_rows, source >= 0, column, ok, x_stride, WIDTH - 1, CHANNELS)
        tl.debug_barrier()  # the slot may be the source: all threads have read it
        slot = tl.load(record + SLOT).to(tl.int64)
        tl.store(states + slot * size + place, last, mask=mask & (num_rows > 0))


KERNELS = KernelSet(_convolve, interpreted=not isinstance(_convolve, triton.JITFunction))


def conv() -> DeviceConv:
    """The backend ``triton``."""
    return DeviceConv("triton", KERNELS)


def available(device: torch.device) -> str | None:
    """Why this backend cannot run on the device; None when it can."""
    return unfit(device, interpreted=KERNELS.interpreted)
