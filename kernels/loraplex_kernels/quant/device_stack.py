"""Parts of a matrix that are stored alike, put into one: what a launch reads. Knows no kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loraplex_kernels.quant.device_layout import Codes
from loraplex_kernels.quant.packing import row_bytes
from loraplex_kernels.quant.stored import NestedScales, PlainScales, Scheme, StoredMatrix, SuperScales
from loraplex_kernels.quant.values import TABLES

#: the tensors that scales are made of, absent ones None
Grids = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Stack:
    """Neighbouring parts of one scheme, stacked by rows; ``start`` is its first row in the whole matrix.

    ``grids``, each with a row for each of ours (or for ``group_rows`` of them), by ``scales``::

        plain    scales, zeros, shifts
        super    scales, outer_scales, mins, outer_mins
        nested   codes, tables [parts, 256], outer scales of all parts, places [parts, PLACE_WORDS] int32
    """

    scheme: Scheme
    start: int
    part_sizes: tuple[int, ...]
    in_features: int
    codes: torch.Tensor  # uint8 [rows, row_bytes]
    table: torch.Tensor | None  # float32 [16]
    scales: str
    grids: Grids
    order: torch.Tensor | None

    @property
    def layout(self) -> Codes:
        return Codes(self.scheme.values.bits, self.scheme.group)

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.in_features, self.scheme.values.bits)

    @property
    def groups(self) -> int:
        return self.scheme.groups(self.in_features)


def stack_parts(parts: Sequence[StoredMatrix]) -> tuple[Stack, ...]:
    """The parts in order, in as few stacks as they allow. A part by itself is not copied."""
    runs: list[list[StoredMatrix]] = []
    for part in parts:
        if runs and _stackable(runs[-1], part):
            runs[-1].append(part)
        else:
            runs.append([part])
    stacks, start = [], 0
    for run in runs:
        stacks.append(_stack(run, start))
        start += sum(part.shape[0] for part in run)
    return tuple(stacks)


def _stackable(above: Sequence[StoredMatrix], part: StoredMatrix) -> bool:
    first = above[0]
    if first.scheme != part.scheme or first.shape[1] != part.shape[1] or type(first.scales) is not type(part.scales):
        return False
    if sum(one.shape[0] for one in above) % part.scheme.group_rows:
        return False
    if [tensor.dtype for tensor in first.scales.tensors] != [tensor.dtype for tensor in part.scales.tensors]:
        return False
    if (first.scales.zeros is None) != (part.scales.zeros is None):
        return False
    if first.order is None or part.order is None:
        return first.order is part.order
    return torch.equal(first.order, part.order)


def _stack(parts: Sequence[StoredMatrix], start: int) -> Stack:
    first = parts[0]
    numbers = TABLES.get(first.scheme.values)
    name, grids = _grids(parts)
    return Stack(
        scheme=first.scheme,
        start=start,
        part_sizes=tuple(part.shape[0] for part in parts),
        in_features=first.shape[1],
        codes=_joined([part.codes for part in parts]),
        table=None if numbers is None else torch.tensor(numbers, dtype=torch.float32, device=first.codes.device),
        scales=name,
        grids=grids,
        order=first.order,
    )


def _grids(parts: Sequence[StoredMatrix]) -> tuple[str, Grids]:
    plain = [part.scales for part in parts if isinstance(part.scales, PlainScales)]
    outer = [part.scales for part in parts if isinstance(part.scales, SuperScales)]
    nested = [part.scales for part in parts if isinstance(part.scales, NestedScales)]
    if plain:
        zeros, shifts = _optional([one.zeros for one in plain]), _optional([one.shifts for one in plain])
        return "plain", (_joined([one.scales for one in plain]), zeros, shifts, None)
    if outer:
        mins, outer_mins = _optional([one.mins for one in outer]), _optional([one.outer_mins for one in outer])
        scales = _joined([one.scales for one in outer])
        return "super", (scales, _joined([one.outer_scales for one in outer]), mins, outer_mins)
    tables = torch.stack([one.table for one in nested])
    codes, outers = _joined([one.codes for one in nested]), _joined([one.outer for one in nested])
    return "nested", (codes, tables, outers, _places(nested))


def _places(nested: Sequence[NestedScales]) -> torch.Tensor:
    """``PLACE_WORDS`` of each part: where its blocks are counted from, and where its outer scales begin."""
    words, begin = np.zeros((len(nested), 4), dtype=np.int32), 0
    for word, scales in zip(words, nested, strict=True):
        word[:3] = scales.first, scales.stride, begin
        word[3] = np.float32(scales.offset).view(np.int32)
        begin += len(scales.outer)
    return torch.from_numpy(words).to(nested[0].codes.device)


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(list(tensors))


def _optional(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return _joined(present) if present else None
