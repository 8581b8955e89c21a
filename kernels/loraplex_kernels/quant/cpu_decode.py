"""Codes to weights in vectors of this processor: the part of the CPU kernel that differs between stored forms.

Codes of 4 bits are looked up: all sixteen weights of a group are computed once, rounding included, and a run of 64
columns is then a load, a shift and two (bfloat16) or four (float32) permutations. Wider codes are converted and scaled
one by one. Either way the weights are those of ``stored.decode``, operation by operation.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from llvmlite import ir

from loraplex_kernels.cpu_ir import F32, I32, I64, PTR, BFloat, Pieces, Value
from loraplex_kernels.lanes import LANES
from loraplex_kernels.quant.packing import RUN
from loraplex_kernels.quant.stored import (
    NESTED_BLOCKS,
    SUPER_COLUMNS,
    PlainScales,
    Scheme,
    StoredMatrix,
    SuperScales,
)
from loraplex_kernels.quant.values import TABLES, Values

I8, I16 = ir.IntType(8), ir.IntType(16)
HALF = ir.HalfType()
#: what e4m3 bits are too small by when they are read as a half's; scales make up for it
_HALF_BITS: Final = 256.0


class Form(NamedTuple):
    """What a kernel is compiled for: everything of a stored matrix but its sizes and addresses."""

    scheme: Scheme
    kind: str  # plain, super or nested
    scales: torch.dtype
    zeros: bool
    shifts: torch.dtype | None


def form_of(stored: StoredMatrix) -> Form | None:
    """The form of a matrix; None for one that no kernel is written for."""
    scheme, scales = stored.scheme, stored.scales
    group, four = scheme.group, scheme.values.bits == 4
    fits = group == 0 or group % RUN == 0 or group == 32 or (group == 16 and not four)
    floats = (torch.float32, torch.float16, torch.bfloat16)
    if not fits or scheme.group_rows & (scheme.group_rows - 1):
        return None
    if isinstance(scales, PlainScales):
        shifts = None if scales.shifts is None else scales.shifts.dtype
        form = Form(scheme, "plain", scales.scales.dtype, scales.zeros is not None, shifts)
        return form if form.scales in floats and form.shifts in (None, *floats) else None
    if isinstance(scales, SuperScales):
        return Form(scheme, "super", scales.scales.dtype, False, None if scales.mins is None else scales.mins.dtype)
    return Form(scheme, "nested", scales.codes.dtype, False, None)


#: int64 fields of a part, in the order the kernel reads them
FIELDS: Final = (
    "first",  # row of y's columns
    "rows",
    "codes",
    "row_bytes",
    "groups",
    "scales",
    "zeros",
    "shifts",  # or mins
    "outer",  # scales of 256 columns, or of 256 blocks
    "outer_shifts",
    "outer_stride",
    "table",
    "offset",  # the bits of a float32
    "block_first",
    "block_stride",
)


def fields_of(stored: StoredMatrix, first: int) -> list[int]:
    """A part's fields; whoever keeps them keeps the matrix."""
    scales = stored.scales
    found = dict.fromkeys(FIELDS, 0)
    found.update(first=first, rows=stored.shape[0], codes=stored.codes.data_ptr(), row_bytes=stored.codes.shape[1])
    if isinstance(scales, PlainScales):
        pointers = {"scales": scales.scales, "zeros": scales.zeros, "shifts": scales.shifts}
    elif isinstance(scales, SuperScales):
        pointers = {
            "scales": scales.scales,
            "shifts": scales.mins,
            "outer": scales.outer_scales,
            "outer_shifts": scales.outer_mins,
        }
        found.update(outer_stride=scales.outer_scales.shape[1])
    else:
        pointers = {"scales": scales.codes, "outer": scales.outer, "table": scales.table}
        bits = struct.unpack("<I", struct.pack("<f", scales.offset))[0]
        found.update(offset=bits, block_first=scales.first, block_stride=scales.stride)
    for name, tensor in pointers.items():
        assert tensor is None or tensor.is_contiguous()
        found[name] = 0 if tensor is None else tensor.data_ptr()
    found["groups"] = scales.tensors[0].shape[1]
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Group:
    """What a group's weights are made with, in every lane: ``(value - zero) * scale * factor + shift``."""

    scale: Value
    zero: Value | None
    shift: Value | None


class Decoder:
    """Emits the decoding of one form into ``pieces``' module; ``pieces.bf`` says for which products.

    ``permutes``: the processor has AVX-512's permutations. Without them codes of 4 bits are decoded as wider ones are.
    """

    def __init__(self, pieces: Pieces, form: Form, *, permutes: bool) -> None:
        self._pieces = pieces
        self._form = form
        self._bf = pieces.bf
        self._looked_up = permutes and form.scheme.values.bits == 4
        #: vectors are the codes' numbers, exact in bfloat16, and sums are multiplied by ``row_scale``: what a weight's
        #: own rounding would lose is kept, and a row of int8 takes two thirds of the time
        self.scales_sums = _scales_sums(form, bfloat16=pieces.bf)
        #: bytes of codes of a run of 64 columns, and its groups
        self.run_bytes = RUN * form.scheme.values.bits // 8
        self.per_run = RUN // form.scheme.group if 0 < form.scheme.group < RUN else 1
        kind = form.scheme.values
        ints = form.scheme.values not in TABLES
        self._numbers = [float(code - form.scheme.zero) for code in range(16)] if ints else TABLES.get(kind)

    @property
    def by_row(self) -> bool:
        """A row has one group."""
        return self._form.scheme.group == 0

    def groups(self, b: Value, part: dict[str, Value], row: Value, run: Value) -> list[Any]:
        """What ``vectors`` needs for a run of a row: its groups, prepared."""
        return [self._prepare(b, self._group(b, part, row, index)) for index in self._indices(b, part, run)]

    def vectors(self, b: Value, codes: Value, groups: Sequence[Any]) -> list[Value]:
        """The weights of the run at ``codes``, in columns' order: 2 vectors of 32 bfloat16, or 4 of 16 float32."""
        if self._looked_up:
            return self._lookups(b, codes, groups)
        quarters = [self._quarter(b, codes, q) for q in range(4)]
        if not self.scales_sums:
            quarters = [self._scaled(b, one, groups[q * self.per_run // 4]) for q, one in enumerate(quarters)]
        if not self._bf:
            return quarters
        kind = ir.VectorType(BFloat(), 2 * LANES)
        pair = self._pieces.declare("llvm.x86.avx512bf16.cvtne2ps2bf16.512", kind, quarters[0].type, quarters[0].type)
        return [b.call(pair, [quarters[1], quarters[0]]), b.call(pair, [quarters[3], quarters[2]])]

    def row_scale(self, b: Value, part: dict[str, Value], row: Value) -> Value:
        """What sums of a row are multiplied by, where they are."""
        scale = b.extract_element(self._group(b, part, row, I64(0)).scale, I32(0))
        factor = self._form.scheme.factor
        return scale if factor == 1.0 else b.fmul(scale, ir.Constant(F32, _single(factor)))

    def _indices(self, b: Value, part: dict[str, Value], run: Value) -> list[Value]:
        group = self._form.scheme.group
        if group == 0:
            return [I64(0)]
        if group >= RUN:
            return [b.udiv(run, I64(group // RUN))]
        # a row's last run may be wider than the row
        last = b.sub(part["groups"], I64(1))
        places = [b.add(b.mul(run, I64(self.per_run)), I64(i)) for i in range(self.per_run)]
        return [b.select(b.icmp_unsigned("<", place, last), place, last) for place in places]

    def _group(self, b: Value, part: dict[str, Value], row: Value, index: Value) -> Group:
        form, scheme = self._form, self._form.scheme
        grid_row = b.lshr(row, I64(scheme.group_rows.bit_length() - 1)) if scheme.group_rows > 1 else row
        place = b.add(b.mul(grid_row, part["groups"]), index)
        zero = shift = None
        if form.kind == "plain":
            scale = self._float(b, part["scales"], place, form.scales)
            zero = self._float(b, part["zeros"], place, torch.uint8) if form.zeros else None
            shift = None if form.shifts is None else self._float(b, part["shifts"], place, form.shifts)
        elif form.kind == "super":
            column = b.udiv(index, I64(SUPER_COLUMNS // scheme.group))
            outer = b.add(b.mul(row, part["outer_stride"]), column)
            d = self._float(b, part["outer"], outer, torch.float16)
            scale = b.fmul(d, self._float(b, part["scales"], place, form.scales))
            if form.shifts is not None:
                d = self._float(b, part["outer_shifts"], outer, torch.float16)
                shift = b.fneg(b.fmul(d, self._float(b, part["shifts"], place, form.shifts)))
        else:
            code = self._integer(b, part["scales"], place)
            inner = self._float(b, part["table"], code, torch.float32)
            block = b.add(b.add(b.mul(row, part["block_stride"]), index), part["block_first"])
            outer = self._float(b, part["outer"], b.udiv(block, I64(NESTED_BLOCKS)), torch.float32)
            offset = self._pieces.splat(b, b.bitcast(b.trunc(part["offset"], I32), F32), LANES)
            scale = b.fadd(b.fmul(inner, outer), offset)
        if scheme.values is Values.E4M3:
            scale = b.fmul(scale, self._constant(_HALF_BITS))
        return Group(scale, zero, shift)

    def _float(self, b: Value, base: Value, index: Value, dtype: torch.dtype) -> Value:
        """Element ``index`` of an array of ``dtype``, as a float in every lane."""
        place = b.inttoptr(b.add(base, b.mul(index, I64(dtype.itemsize))), PTR)
        floats, longs = self._pieces.sum, ir.VectorType(I32, LANES)

        def lanes(kind: Value) -> Value:
            return self._pieces.splat(b, b.load(place, typ=kind, align=1), LANES)

        if dtype is torch.float32:
            return lanes(F32)
        if dtype is torch.float16:
            return b.fpext(b.bitcast(lanes(I16), ir.VectorType(HALF, LANES)), floats)
        if dtype is torch.bfloat16:
            return b.bitcast(b.shl(b.zext(lanes(I16), longs), ir.Constant(longs, [16] * LANES)), floats)
        if dtype is torch.int8:
            return b.sitofp(b.sext(lanes(I8), longs), floats)
        return b.uitofp(b.zext(lanes(I8), longs), floats)

    def _constant(self, value: float) -> Value:
        """In every lane."""
        return ir.Constant(self._pieces.sum, [ir.Constant(F32, _single(value))] * LANES)

    def _integer(self, b: Value, base: Value, index: Value) -> Value:
        return b.zext(b.load(b.inttoptr(b.add(base, index), PTR), typ=I8, align=1), I64)

    def _prepare(self, b: Value, group: Group) -> Any:
        """Of looked-up codes, the sixteen weights; else the group's numbers in every lane."""
        if self.scales_sums:
            return None
        if not self._looked_up:
            return group
        assert self._numbers is not None
        values = ir.Constant(self._pieces.sum, [ir.Constant(F32, _single(one)) for one in self._numbers])
        weights = self._scaled(b, values, group)
        if not self._bf:
            return weights
        narrow = b.fptrunc(weights, ir.VectorType(BFloat(), LANES))
        twice = ir.Constant(ir.VectorType(I32, 2 * LANES), [*range(LANES), *range(LANES)])
        words = ir.VectorType(I16, LANES)
        narrow = b.bitcast(narrow, words)
        return b.shuffle_vector(narrow, ir.Constant(words, ir.Undefined), twice)

    def _scaled(self, b: Value, values: Value, group: Group) -> Value:
        scheme = self._form.scheme
        if group.zero is not None:
            values = b.fsub(values, group.zero)
        values = b.fmul(values, group.scale)
        if scheme.factor != 1.0:
            values = b.fmul(values, self._constant(scheme.factor))
        if group.shift is not None:
            values = b.fadd(values, group.shift)
        own = torch.bfloat16 if self._bf else torch.float32
        if scheme.rounded in (None, own, torch.float32):
            return values
        if scheme.rounded is torch.float16:
            return b.fpext(b.fptrunc(values, ir.VectorType(HALF, LANES)), self._pieces.sum)
        return self._through_bfloat16(b, values)

    def _through_bfloat16(self, b: Value, values: Value) -> Value:
        """Rounded to the nearest, ties to even, by integers: not every processor has an instruction for it."""
        longs = ir.VectorType(I32, LANES)
        bits = b.bitcast(values, longs)
        odd = b.and_(b.lshr(bits, ir.Constant(longs, [16] * LANES)), ir.Constant(longs, [1] * LANES))
        bits = b.add(bits, b.add(odd, ir.Constant(longs, [0x7FFF] * LANES)))
        bits = b.and_(bits, ir.Constant(longs, [0xFFFF0000] * LANES))
        return b.bitcast(bits, self._pieces.sum)

    def _lookups(self, b: Value, codes: Value, groups: Sequence[Any]) -> list[Value]:
        pieces, halves = self._pieces, [groups[0], groups[-1]]
        if self._bf:
            words = ir.VectorType(I16, 2 * LANES)
            low = b.zext(pieces.load(b, codes, I64(0), ir.VectorType(I8, 2 * LANES)), words)
            high = b.lshr(low, ir.Constant(words, [4] * (2 * LANES)))
            look_up = pieces.declare("llvm.x86.avx512.permvar.hi.512", words, words, words)
            found = [b.call(look_up, [table, index]) for table, index in zip(halves, (low, high), strict=True)]
            return [b.bitcast(one, ir.VectorType(BFloat(), 2 * LANES)) for one in found]
        longs = ir.VectorType(I32, LANES)
        look_up = pieces.declare("llvm.x86.avx512.permvar.sf.512", pieces.sum, pieces.sum, longs)
        lows = [b.zext(pieces.load(b, codes, I64(LANES * i), ir.VectorType(I8, LANES)), longs) for i in range(2)]
        highs = [b.lshr(low, ir.Constant(longs, [4] * LANES)) for low in lows]
        return [b.call(look_up, [halves[i // 2], index]) for i, index in enumerate((*lows, *highs))]

    def _quarter(self, b: Value, codes: Value, q: int) -> Value:
        """16 numbers of the run, less the scheme's zero."""
        scheme, pieces = self._form.scheme, self._pieces
        kind, longs = scheme.values, ir.VectorType(I32, LANES)
        if kind.bits == 8:
            found = pieces.load(b, codes, I64(LANES * q), ir.VectorType(I8, LANES))
            if kind is Values.E4M3:
                return self._e4m3(b, found)
            signed = kind is Values.INT8
            values = (
                b.sitofp(b.sext(found, longs), pieces.sum) if signed else b.uitofp(b.zext(found, longs), pieces.sum)
            )
        else:
            integers = self._nibbles(b, codes, q)
            if kind in TABLES:
                return self._chosen(b, integers, [self._constant(number) for number in TABLES[kind]])
            if kind is Values.UINT6:
                high = b.zext(pieces.load(b, codes, I64(2 * LANES), ir.VectorType(I8, LANES)), longs)
                high = b.and_(b.lshr(high, ir.Constant(longs, [2 * q] * LANES)), ir.Constant(longs, [3] * LANES))
                integers = b.or_(integers, b.shl(high, ir.Constant(longs, [4] * LANES)))
            values = b.uitofp(integers, pieces.sum)
        return b.fsub(values, self._constant(scheme.zero)) if scheme.zero else values

    def _nibbles(self, b: Value, codes: Value, q: int) -> Value:
        """16 codes of 4 bits, or the low 4 of 6."""
        longs = ir.VectorType(I32, LANES)
        found = b.zext(self._pieces.load(b, codes, I64(LANES * (q % 2)), ir.VectorType(I8, LANES)), longs)
        if q >= 2:
            found = b.lshr(found, ir.Constant(longs, [4] * LANES))
        return b.and_(found, ir.Constant(longs, [15] * LANES))

    def _chosen(self, b: Value, codes: Value, numbers: list[Value]) -> Value:
        """The number of each code, chosen bit by bit from the highest."""
        if len(numbers) == 1:
            return numbers[0]
        half, longs = len(numbers) // 2, ir.VectorType(I32, LANES)
        bit = b.and_(codes, ir.Constant(longs, [half] * LANES))
        is_on = b.icmp_unsigned("!=", bit, ir.Constant(longs, [0] * LANES))
        return b.select(is_on, self._chosen(b, codes, numbers[half:]), self._chosen(b, codes, numbers[:half]))

    def _e4m3(self, b: Value, found: Value) -> Value:
        """Read as halves, whose exponents are 8 larger."""
        words = ir.VectorType(I16, LANES)
        wide = b.zext(found, words)
        sign = b.shl(b.and_(wide, ir.Constant(words, [128] * LANES)), ir.Constant(words, [8] * LANES))
        rest = b.shl(b.and_(wide, ir.Constant(words, [127] * LANES)), ir.Constant(words, [7] * LANES))
        half = b.bitcast(b.or_(sign, rest), ir.VectorType(HALF, LANES))
        return b.fpext(half, self._pieces.sum)


def _scales_sums(form: Form, *, bfloat16: bool) -> bool:
    """Whether the codes of a row are exact in bfloat16 and share one scale, and nothing else is done to them."""
    scheme = form.scheme
    exact = scheme.values in (Values.INT8, Values.E4M3) and not scheme.zero and scheme.rounded is None
    return bfloat16 and exact and scheme.group == 0 and form.kind == "plain" and not form.zeros and form.shifts is None


def _single(value: float) -> float:
    """The nearest float32."""
    single: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return single
