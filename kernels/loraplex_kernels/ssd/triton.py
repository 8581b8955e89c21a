"""The scan of Mamba2 and its gate in Triton. Chunks and launches are in the ``device_*`` files.

A span of one row reads its state, changes it and multiplies it with C in one pass, a program for some rows of a head's
state. Spans of several rows are scanned in chunks, by three kernels: what each chunk adds to the state; the states
between a span's chunks, one after the other; y, from the state before a chunk and the products of its own rows. Within
a chunk, decays are sums over a tile's rows; from tile to tile they are multiplied. So no exponent is above zero, and
differences of sums are those of a tile, whatever the chunk's length.

Products of 2-byte inputs have their dtype, but for those with states, which are float32: their products are in tf32.
All sums are float32, in an order that depends on the span alone. What a mask leaves out is selected away, never
multiplied by zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loraplex_kernels import state_records
from loraplex_kernels.conv.triton import silu
from loraplex_kernels.lora.triton import unfit
from loraplex_kernels.ssd import device_plan
from loraplex_kernels.ssd.device import DeviceSsd
from loraplex_kernels.ssd.device_launch import KernelSet, SsdKernels

FIRST_ROW: tl.constexpr = tl.constexpr(state_records.FIRST_ROW)
NUM_ROWS: tl.constexpr = tl.constexpr(state_records.NUM_ROWS)
SOURCE: tl.constexpr = tl.constexpr(state_records.SOURCE)
SLOT: tl.constexpr = tl.constexpr(state_records.SLOT)
LIMITED_ROWS: tl.constexpr = tl.constexpr(state_records.LIMITED)
SAVES: tl.constexpr = tl.constexpr(state_records.SAVES)
NUM_SAVES: tl.constexpr = tl.constexpr(state_records.NUM_SAVES)
RECORD: tl.constexpr = tl.constexpr(state_records.RECORD)
SAVE: tl.constexpr = tl.constexpr(state_records.SAVE)
CHUNK_SPAN: tl.constexpr = tl.constexpr(device_plan.CHUNK_SPAN)
CHUNK_ROW: tl.constexpr = tl.constexpr(device_plan.CHUNK_ROW)
CHUNK_ROWS: tl.constexpr = tl.constexpr(device_plan.CHUNK_ROWS)
CHUNK_LIMITED: tl.constexpr = tl.constexpr(device_plan.CHUNK_LIMITED)
CHUNK_SAVE: tl.constexpr = tl.constexpr(device_plan.CHUNK_SAVE)
CHUNK: tl.constexpr = tl.constexpr(device_plan.CHUNK)
RUN_SPAN: tl.constexpr = tl.constexpr(device_plan.RUN_SPAN)
RUN_CHUNK: tl.constexpr = tl.constexpr(device_plan.RUN_CHUNK)
RUN_CHUNKS: tl.constexpr = tl.constexpr(device_plan.RUN_CHUNKS)
RUN: tl.constexpr = tl.constexpr(device_plan.RUN)


@triton.jit
def _softplus(value):
    """log(1 + exp(value)), of small results as exact as of large ones: log(1 + e) = 2 artanh(e / (2 + e))."""
    small = tl.exp(-tl.abs(value))
    part = small / (2.0 + small)  # at most 1/3
    square = part * part
    series = 1.0 / 13 + square * (1.0 / 15)
    series = 1.0 / 9 + square * (1.0 / 11 + square * series)
    series = 1.0 + square * (1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7 + square * series)))
    return tl.where(value > 0.0, value, 0.0) + 2.0 * part * series


@triton.jit
def _time_step(dt, bias, limited, low, high, LIMITED: tl.constexpr):
    """The time step of rows; one that is no number stays that."""
    step = _softplus(dt.to(tl.float32) + bias)
    if LIMITED:
        held = tl.where(step < low, low, tl.where(step > high, high, step))
        step = tl.where(limited, held, step)
    return step


@triton.jit
def _block(base, row, stride, column, row_ok, column_ok):
    """Values of some rows at some columns; zeros where these are not ok."""
    place = base + (row * stride)[:, None] + column[None, :]
    return tl.load(place, mask=row_ok[:, None] & column_ok[None, :], other=0.0)


@triton.jit
def _update(
    y, states, x, dt, b, c, a, d, dt_bias, x_stride, dt_stride, b_stride, c_stride, own_stride,
    records, saves, low, high,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, STATE: tl.constexpr,
    LIMITED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Spans of one row: BLOCK_P rows of a head's state for a program. A padded one's y is zero."""
    tiles: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
    span = tl.program_id(0) // (HEADS * tiles)
    head = tl.program_id(0) // tiles % HEADS
    record = records + span * RECORD
    live = tl.load(record + NUM_ROWS) > 0
    row = tl.load(record + FIRST_ROW).to(tl.int64)
    source = tl.load(record + SOURCE).to(tl.int64)
    dim = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    dim_ok, n_ok = (dim < HEAD_DIM) & live, (n < STATE) & live
    mask = dim_ok[:, None] & n_ok[None, :]
    place = (head * HEAD_DIM + dim)[:, None] * STATE + n[None, :]
    size: tl.constexpr = HEADS * HEAD_DIM * STATE
    state = tl.load(states + tl.maximum(source, 0) * size + place, mask=mask & (source >= 0), other=0.0)
    own = span.to(tl.int64) * own_stride + head
    limited = tl.load(record + LIMITED_ROWS) > 0
    step = _time_step(tl.load(dt + row * dt_stride + head), tl.load(dt_bias + own), limited, low, high, LIMITED)
    values = tl.load(x + row * x_stride + head * HEAD_DIM + dim, mask=dim_ok, other=0.0).to(tl.float32)
    group = head // GROUP * STATE
    into = tl.load(b + row * b_stride + group + n, mask=n_ok, other=0.0).to(tl.float32)
    out_of = tl.load(c + row * c_stride + group + n, mask=n_ok, other=0.0).to(tl.float32)
    state = state * tl.exp(step * tl.load(a + own)) + (step * values)[:, None] * into[None, :]
    result = tl.sum(state * out_of[None, :], 1) + tl.load(d + own) * values
    result = tl.where(live, result, 0.0).to(y.dtype.element_ty)
    tl.store(y + (row * HEADS + head) * HEAD_DIM + dim, result, mask=dim < HEAD_DIM)
    slot = tl.load(record + SLOT).to(tl.int64)
    tl.store(states + slot * size + place, state, mask=mask)
    first_save = saves + tl.load(record + SAVES) * SAVE
    for index in range(tl.load(record + NUM_SAVES)):
        slot = tl.load(first_save + index * SAVE + 1).to(tl.int64)
        tl.store(states + slot * size + place, state, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _chunk_states(
    between, totals, steps, num_rows, x, dt, b, c, a, d, dt_bias, x_stride, dt_stride, b_stride, c_stride, own_stride,
    chunks, low, high,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, STATE: tl.constexpr,
    ROWS: tl.constexpr, LIMITED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state, and its log decay; of its rows the time steps and the log decays from their
    tile's begin, in ``steps``."""
    tiles_n: tl.constexpr = (STATE + BLOCK_N - 1) // BLOCK_N
    tiles: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P * tiles_n
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % HEADS
    item = (tl.program_id(0) // (tiles * HEADS)).to(tl.int64)
    chunk = chunks + item * CHUNK
    rows = tl.load(chunk + CHUNK_ROWS)
    first_row = tl.load(chunk + CHUNK_ROW).to(tl.int64)
    limited = tl.load(chunk + CHUNK_LIMITED)
    own = tl.load(chunk + CHUNK_SPAN).to(tl.int64) * own_stride + head
    bias, decay = tl.load(dt_bias + own), tl.load(a + own)
    dim = tile // tiles_n * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    added = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    total = 0.0
    for start in tl.range(0, rows, ROWS):
        at = start + tl.arange(0, ROWS)
        live = at < rows
        row = first_row + at
        step = tl.load(dt + row * dt_stride + head, mask=live, other=0.0)
        step = tl.where(live, _time_step(step, bias, at < limited, low, high, LIMITED), 0.0)
        log_decay = tl.cumsum(step * decay, 0)
        last = tl.sum(tl.where(tl.arange(0, ROWS) == ROWS - 1, log_decay, 0.0), 0)
        if tile == 0:
            kept = steps + head.to(tl.int64) * num_rows + row
            tl.store(kept, step, mask=live)
            tl.store(kept + HEADS * num_rows.to(tl.int64), log_decay, mask=live)
        values = _block(x + head * HEAD_DIM, row, x_stride, dim, live, dim < HEAD_DIM)
        into = _block(b + head // GROUP * STATE, row, b_stride, n, live, n < STATE)
        weighted = values.to(tl.float32) * (step * tl.exp(last - log_decay))[:, None]
        rounded = weighted.to(into.dtype)
        added = tl.dot(tl.trans(rounded), into, added * tl.exp(last), input_precision="ieee")
        if into.dtype != tl.float32:  # what rounding has taken: states stay nearly as exact as float32
            rest = (weighted - rounded.to(tl.float32)).to(into.dtype)
            added = tl.dot(tl.trans(rest), into, added, input_precision="ieee")
        total += last
    place = (item * HEADS + head) * (HEAD_DIM * STATE) + dim[:, None] * STATE + n[None, :]
    tl.store(between + place, added, mask=(dim < HEAD_DIM)[:, None] & (n < STATE)[None, :])
    if tile == 0:
        tl.store(totals + item * HEADS + head, total)


@triton.jit
def _pass_states(
    between, totals, states, records, chunks, runs, HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """A span's states from chunk to chunk: what each chunk adds gives way to the state before it."""
    tiles: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    element = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    ok = element < SIZE
    head = tl.program_id(0) // tiles % HEADS
    run = runs + tl.program_id(0) // (tiles * HEADS) * RUN
    record = records + tl.load(run + RUN_SPAN) * RECORD
    source = tl.load(record + SOURCE).to(tl.int64)
    known = ok & (source >= 0)
    state = tl.load(states + (tl.maximum(source, 0) * HEADS + head) * SIZE + element, mask=known, other=0.0)
    first = tl.load(run + RUN_CHUNK).to(tl.int64)
    for index in tl.range(0, tl.load(run + RUN_CHUNKS)):
        item = first + index
        at = item * HEADS + head
        place = between + at * SIZE + element
        added = tl.load(place, mask=ok, other=0.0)
        tl.store(place, state, mask=ok)
        state = state * tl.exp(tl.load(totals + at)) + added
        save = tl.load(chunks + item * CHUNK + CHUNK_SAVE).to(tl.int64)
        tl.store(states + (tl.maximum(save, 0) * HEADS + head) * SIZE + element, state, mask=ok & (save >= 0))
    slot = tl.load(record + SLOT).to(tl.int64)
    tl.store(states + (slot * HEADS + head) * SIZE + element, state, mask=ok)


@triton.jit(do_not_specialize=["num_rows"])
def _chunk_scan(
    y, between, totals, steps, num_rows, x, dt, b, c, a, d, dt_bias, x_stride, dt_stride, b_stride, c_stride,
    own_stride, chunks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, STATE: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of a tile of a chunk's rows: its own tile, those before it from the nearest on, then the state before all."""
    tiles_p: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
    dim = tl.program_id(0) % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    head = tl.program_id(0) // tiles_p % HEADS
    tile = tl.program_id(0) // (tiles_p * HEADS) % TILES
    item = (tl.program_id(0) // (tiles_p * HEADS * TILES)).to(tl.int64)
    chunk = chunks + item * CHUNK
    rows = tl.load(chunk + CHUNK_ROWS)
    if tile * ROWS < rows:
        first_row = tl.load(chunk + CHUNK_ROW).to(tl.int64)
        lane = tl.arange(0, ROWS)
        live = tile * ROWS + lane < rows
        row = first_row + tile * ROWS + lane
        n = tl.arange(0, BLOCK_N)
        x += head * HEAD_DIM
        b += head // GROUP * STATE
        c += head // GROUP * STATE
        step_of = steps + head.to(tl.int64) * num_rows + first_row
        log_of = step_of + HEADS * num_rows.to(tl.int64)
        out_of = _block(c, row, c_stride, n, live, n < STATE)
        into = _block(b, row, b_stride, n, live, n < STATE)
        values = _block(x, row, x_stride, dim, live, dim < HEAD_DIM)
        step = tl.load(step_of + tile * ROWS + lane, mask=live, other=0.0)
        log_decay = tl.load(log_of + tile * ROWS + lane, mask=live, other=0.0)
        weight = tl.dot(out_of, tl.trans(into), input_precision="ieee") * step[None, :]
        causal = (lane[:, None] >= lane[None, :]) & live[:, None]
        weight *= tl.exp(tl.where(causal, log_decay[:, None] - log_decay[None, :], 0.0))
        weight = tl.where(causal, weight, 0.0)
        inner = tl.dot(weight.to(values.dtype), values, input_precision="ieee")
        own = tl.load(chunk + CHUNK_SPAN).to(tl.int64) * own_stride + head
        inner += tl.load(d + own) * values.to(tl.float32)
        decayed = 0.0  # log decay from an earlier tile's end to this one's begin
        outer = tl.zeros([ROWS, BLOCK_P], tl.float32)
        for back in tl.range(0, tile):
            start = (tile - 1 - back) * ROWS
            earlier = first_row + start + lane  # all of them are rows of the chunk
            keys = _block(b, earlier, b_stride, n, lane >= 0, n < STATE)
            taken = _block(x, earlier, x_stride, dim, lane >= 0, dim < HEAD_DIM)
            last = tl.load(log_of + start + ROWS - 1)
            factor = tl.load(step_of + start + lane) * tl.exp(decayed + last - tl.load(log_of + start + lane))
            weighted = tl.dot(out_of, tl.trans(keys), input_precision="ieee") * factor[None, :]
            outer = tl.dot(weighted.to(taken.dtype), taken, outer, input_precision="ieee")
            decayed += last
        before = between + (item * HEADS + head) * (HEAD_DIM * STATE)
        product = tl.zeros([ROWS, BLOCK_P], tl.float32)
        for start in tl.range(0, STATE, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            state = _block(before, dim, STATE, k, dim < HEAD_DIM, k < STATE)
            part = _block(c, row, c_stride, k, live, k < STATE).to(tl.float32)
            product = tl.dot(part, tl.trans(state), product, input_precision=PRECISION)
        result = inner + tl.exp(log_decay)[:, None] * (outer + tl.exp(decayed) * product)
        place = y + ((row * HEADS + head) * HEAD_DIM)[:, None] + dim[None, :]
        tl.store(place, result.to(y.dtype.element_ty), mask=live[:, None] & (dim < HEAD_DIM)[None, :])


@triton.jit
def _gate(
    out, y, z, weight, y_stride, z_stride, weight_stride, eps,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """A row's WIDTH values that are normed together, before the gate if FIRST; without a weight they are gated."""
    parts: tl.constexpr = (SIZE + WIDTH - 1) // WIDTH
    row = (tl.program_id(0) // parts).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    column = tl.program_id(0) % parts * WIDTH + lane
    ok = (lane < WIDTH) & (column < SIZE)
    value = tl.load(y + row * y_stride + column, mask=ok, other=0.0).to(tl.float32)
    gate = silu(tl.load(z + row * z_stride + column, mask=ok, other=0.0).to(tl.float32))
    if weight is None:
        value *= gate
    else:
        if not FIRST:
            value *= gate
        value *= tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
        value *= tl.load(weight + row * weight_stride + column, mask=ok, other=0.0).to(tl.float32)
        if FIRST:
            value *= gate
    tl.store(out + row * SIZE + column, value.to(out.dtype.element_ty), mask=ok)


KERNELS = KernelSet(
    _update, _chunk_states, _pass_states, _chunk_scan, _gate, interpreted=not isinstance(_update, triton.JITFunction)
)


def ssd() -> DeviceSsd:
    """The backend ``triton``."""
    return DeviceSsd("triton", SsdKernels(KERNELS))


def available(device: torch.device) -> str | None:
    """Why this backend cannot run on the device; None when it can."""
    return unfit(device, interpreted=KERNELS.interpreted)
