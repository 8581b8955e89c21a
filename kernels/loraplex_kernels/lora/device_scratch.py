"""The memory that all tables of a device backend share while a step runs: h between its two products, and counters."""

from __future__ import annotations

import torch

from loraplex_kernels.lora.device_layout import ALIGNMENT, HEADER_WORDS
from loraplex_kernels.lora.uploads import DeviceQueue


class Scratch:
    """Grows with the largest step and the largest ranks so far. Kernels find it through ``header``, which never moves.

    One scratch serves all tables because they run one after the other on one stream; it is rewritten in that stream's
    order, and what it replaces is given back in that order too.
    """

    def __init__(self, queue: DeviceQueue) -> None:
        self._queue = queue
        self._cells = 0  # planes x rows of the largest step
        self._ranks = ALIGNMENT
        self._pairs = 1
        self._h = torch.empty(0)
        self._counters = torch.empty(0)
        self.header = queue.allocate(8 * HEADER_WORDS).view(torch.int64)
        self._replace()

    @property
    def nbytes(self) -> int:
        return self._h.nbytes + self._counters.nbytes

    def reserve_step(self, cells: int, pairs: int) -> None:
        """Room for a step: ``cells`` rows of h over all planes, and counters for ``pairs``. Raises MemoryError."""
        if cells > self._cells or pairs > self._pairs:
            self._grow(max(cells, self._cells), self._ranks, max(pairs, self._pairs))

    def reserve_ranks(self, ranks: int) -> None:
        """Room for a slot with ``ranks`` rows of A in one table. Raises MemoryError."""
        if ranks > self._ranks:
            self._grow(self._cells, -(-ranks // ALIGNMENT) * ALIGNMENT, self._pairs)

    def _grow(self, cells: int, ranks: int, pairs: int) -> None:
        before = self._cells, self._ranks, self._pairs
        self._cells, self._ranks, self._pairs = cells, ranks, pairs
        try:
            self._replace()
        except MemoryError:
            self._cells, self._ranks, self._pairs = before
            raise

    def _replace(self) -> None:
        h = self._queue.allocate(4 * max(1, self._cells) * self._ranks)
        counters = self._queue.allocate(4 * 2 * self._pairs)
        counters.zero_()
        words = self._queue.host(self.header.nbytes).view(torch.int64)
        words[:] = torch.tensor([h.data_ptr(), self._ranks, counters.data_ptr()])
        self._queue.put(self.header, words)
        self._h, self._counters = h, counters
