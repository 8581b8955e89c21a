"""What state-space layers keep of each sequence between steps: memory by slot, and what a step does with slots.

A slot holds, for each such layer, the last inputs of its convolution and the state of its scan. The ops ``conv`` and
``ssd`` share these descriptions and this memory; each has its own backends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

#: a source that is no slot: the sequence begins in this step, with states of zero
BLANK: Final = -1


@dataclass(frozen=True, slots=True)
class StateSpan:
    """One sequence's part of a step: ``num_rows`` rows, at least 1.

    Its states before the first row are read from slot ``source``, or are zero where that is ``BLANK``; those after the
    last row are written to slot ``slot``, which may be the same. ``saves``: pairs (n, slot), n rising from 1 to
    ``num_rows``: the states after the first n rows are written there, too. A slot that one span writes is neither
    written nor read by anything else in the step, but that a span's ``source`` may be its own ``slot``.
    ``num_limited``: how many of its first rows have their time steps held to the layer's limits
    (``ssd.SsdParameters``).
    """

    num_rows: int
    slot: int
    source: int = BLANK
    saves: tuple[tuple[int, int], ...] = ()
    num_limited: int = 0


@dataclass(frozen=True, slots=True)
class StateShape:
    """What one slot holds, of ``num_layers`` layers alike: the ``conv_rows`` last inputs of ``conv_dim`` channels (one
    less than the kernel is wide), and ``heads`` states ``[head_dim, state_size]`` in float32."""

    num_layers: int
    conv_dim: int
    conv_rows: int
    heads: int
    head_dim: int
    state_size: int

    def slot_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one slot whose inputs are kept in ``dtype``."""
        conv = self.conv_dim * self.conv_rows * dtype.itemsize
        scan = self.heads * self.head_dim * self.state_size * torch.float32.itemsize
        return self.num_layers * (conv + scan)


class StatePool:
    """All slots, zeroed. Of layer l: ``conv[l]`` is ``[num_slots, conv_rows, conv_dim]`` in the model's dtype, the
    oldest input first; ``ssd[l]`` is ``[num_slots, heads, head_dim, state_size]`` float32. Both are contiguous."""

    def __init__(self, shape: StateShape, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.num_slots = num_slots
        conv = (shape.num_layers, num_slots, shape.conv_rows, shape.conv_dim)
        scan = (shape.num_layers, num_slots, shape.heads, shape.head_dim, shape.state_size)
        self._conv = torch.zeros(conv, dtype=dtype, device=device)
        self._ssd = torch.zeros(scan, dtype=torch.float32, device=device)
        self.conv = list(self._conv.unbind(0))
        self.ssd = list(self._ssd.unbind(0))
        self.dtype, self.device = dtype, self._conv.device
        self.nbytes = self._conv.nbytes + self._ssd.nbytes

    def copy(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Of each pair (source, slot): ``slot`` holds what ``source`` does, of all layers. No slot is both.

        One slot after the other, so that no memory is taken: a slot is large.
        """
        for source, slot in pairs:
            for states in (self._conv, self._ssd):
                states[:, slot].copy_(states[:, source])


def check_spans(spans: Sequence[StateSpan], num_slots: int) -> None:
    """Raise ValueError for spans that break the rules of ``StateSpan`` in a pool of ``num_slots``."""
    written: dict[int, int] = {}
    for index, span in enumerate(spans):
        if span.num_rows < 1 or not 0 <= span.num_limited <= span.num_rows:
            raise ValueError(
                f"sequence {index} of the step: {span.num_rows} rows, {span.num_limited} of them limited; must be at "
                f"least 1, and at most all"
            )
        ends = [after for after, _ in span.saves]
        if ends != sorted(set(ends)) or (ends and not 1 <= ends[0] <= ends[-1] <= span.num_rows):
            raise ValueError(
                f"sequence {index} of the step: states saved after {ends} rows; must rise within 1..{span.num_rows}"
            )
        for slot in (span.slot, *(slot for _, slot in span.saves)):
            if not 0 <= slot < num_slots:
                raise ValueError(f"sequence {index} of the step: slot {slot}, must lie in 0..{num_slots - 1}")
            if slot in written:
                raise ValueError(f"sequences {written[slot]} and {index} of the step both write slot {slot}")
            written[slot] = index
        if not BLANK <= span.source < num_slots:
            raise ValueError(f"sequence {index} of the step: source {span.source}, must lie in -1..{num_slots - 1}")
    for index, span in enumerate(spans):
        writer = written.get(span.source)
        if writer is not None and (writer != index or span.source != span.slot):
            raise ValueError(f"sequence {index} of the step reads slot {span.source}, which sequence {writer} writes")
