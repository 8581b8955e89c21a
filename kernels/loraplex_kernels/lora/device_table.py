"""The slots of one table in device memory: each one allocation in its true ranks, found through a row of addresses."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from loraplex_kernels.lora import PartDelta, SlotDelta
from loraplex_kernels.lora.device_layout import ALIGNMENT, PART_WORDS, ROOT_WORDS, SLOT_WORDS
from loraplex_kernels.lora.device_scratch import Scratch
from loraplex_kernels.lora.slots import SlotBook
from loraplex_kernels.lora.uploads import Copy, DeviceQueue

#: slot rows of a table that holds one slot
FEWEST_ROWS = 8


@dataclass(frozen=True, slots=True)
class DevicePacked:
    """A delta laid out in host memory that the device copies from, and the slot row that will point into the copy."""

    buffer: torch.Tensor  # uint8
    row: tuple[int, ...]
    """The slot row with offsets into ``buffer`` where ``device_layout`` says addresses."""
    addresses: tuple[int, ...]
    """Which words of ``row`` are offsets; other words that mean addresses are 0, absent."""
    ranks: int
    scales_input: bool

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    def at(self, base: int) -> list[int]:
        """The slot row of a copy at address ``base``."""
        row = list(self.row)
        for word in self.addresses:
            row[word] += base
        return row


class _Layout:
    """Offsets of a slot's tensors, in the order they are asked for."""

    def __init__(self, num_parts: int) -> None:
        self.row = [0] * (SLOT_WORDS + num_parts * PART_WORDS)
        self.addresses: list[int] = []
        self.pieces: list[tuple[int, torch.Tensor]] = []
        self.nbytes = 0

    def place(self, word: int, *tensors: torch.Tensor | None) -> None:
        """Put ``tensors`` one behind the other and note their offset in ``word``; nothing when they are absent."""
        present = [tensor for tensor in tensors if tensor is not None]
        if not present:
            return
        self.nbytes = -(-self.nbytes // ALIGNMENT) * ALIGNMENT
        self.row[word] = self.nbytes
        self.addresses.append(word)
        for tensor in present:
            self.pieces.append((self.nbytes, tensor))
            self.nbytes += tensor.nbytes


def pack_delta(delta: SlotDelta, queue: DeviceQueue) -> DevicePacked:
    """Lay a checked delta out: ``[ranks of all parts, in]`` of A, then per part B transposed, then the vectors."""
    layout = _Layout(len(delta.parts))
    parts = [part or PartDelta() for part in delta.parts]
    pairs = [part.factors for part in parts]
    layout.place(0, *(pair and pair.a for pair in pairs))
    layout.place(2, delta.in_scale)
    ranks = 0
    for index, (part, pair) in enumerate(zip(parts, pairs, strict=True)):
        word = SLOT_WORDS + index * PART_WORDS
        if pair is not None:
            layout.place(word, pair.b.t())
            layout.row[word + 1 : word + 3] = ranks, pair.a.shape[0]
            ranks += pair.a.shape[0]
        layout.place(word + 3, part.out_scale)
        layout.place(word + 4, part.shift)
    layout.row[1] = ranks
    buffer = queue.host(layout.nbytes)
    for offset, tensor in layout.pieces:
        buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return DevicePacked(buffer, tuple(layout.row), tuple(layout.addresses), ranks, delta.in_scale is not None)


@dataclass(frozen=True, slots=True)
class _Upload:
    """A delta on its way: the slot's row does not point to it yet."""

    memory: torch.Tensor
    packed: DevicePacked
    copy: Copy


@dataclass(frozen=True, slots=True)
class DeviceSide:
    """What the tables of a backend share on one device."""

    queue: DeviceQueue
    scratch: Scratch
    book: SlotBook
    unsettled: set[SlotMemory]
    """Tables with uploads that no slot row points to yet."""
    scaling: Counter[int]
    """Slot -> at how many tables it scales their input."""


class SlotMemory:
    """Owner of a table's slots. A slot's row is written when its copy is over, or when a plan asks for the slot.

    So a step waits only for uploads of adapters that it runs, not for those that happen to be under way.
    """

    def __init__(self, num_parts: int, max_bytes: int, side: DeviceSide) -> None:
        self._side = side
        self._max_bytes = max_bytes
        self._used_bytes = 0
        self._held: dict[int, torch.Tensor] = {}
        self._uploads: dict[int, _Upload] = {}
        self._host_rows = np.zeros((0, SLOT_WORDS + num_parts * PART_WORDS), dtype=np.int64)
        self._rows = torch.empty(0)
        self.root = side.queue.allocate(8 * ROOT_WORDS).view(torch.int64)
        self._put(self.root, np.zeros(ROOT_WORDS, dtype=np.int64))
        self.scaling: set[int] = set()
        """Slots that scale their input."""

    def holds_any(self, slots: frozenset[int]) -> bool:
        """Whether a plan of these slots changes anything here."""
        return not (slots.isdisjoint(self._held) and slots.isdisjoint(self._uploads))

    def write(self, slot: int, packed: DevicePacked) -> Copy:
        """Begin to put ``packed`` into ``slot``. Raises MemoryError, and changes nothing, when there is no room."""
        old = self._nbytes(slot)
        if self._used_bytes - old + packed.nbytes > self._max_bytes:
            raise MemoryError(
                f"slot {slot}: {packed.nbytes} bytes do not fit; {self._used_bytes - old} of the table's "
                f"{self._max_bytes} bytes are in use"
            )
        self._side.scratch.reserve_ranks(packed.ranks)
        memory = self._side.queue.allocate(packed.nbytes)
        self._reserve_row(slot)
        if not self.holds_any(frozenset((slot,))):
            self._side.book.filled(slot)
        self._drop_upload(slot)
        copy = self._side.queue.copy_beside(memory, packed.buffer)
        self._uploads[slot] = _Upload(memory, packed, copy)
        self._side.unsettled.add(self)
        self._used_bytes += packed.nbytes - old
        self._note_scaling(slot, scales=packed.scales_input)
        return copy

    def clear(self, slot: int) -> None:
        """Forget ``slot`` in the order of launched work."""
        if not self.holds_any(frozenset((slot,))):
            return
        self._used_bytes -= self._nbytes(slot)
        self._drop_upload(slot)
        if slot in self._held:
            self._put_row(slot, [0] * self._host_rows.shape[1])
            del self._held[slot]
        self._note_scaling(slot, scales=False)
        self._side.book.emptied(slot)

    def _note_scaling(self, slot: int, *, scales: bool) -> None:
        if scales == (slot in self.scaling):
            return
        everywhere = self._side.scaling
        (self.scaling.add if scales else self.scaling.remove)(slot)
        everywhere[slot] += 1 if scales else -1
        if not everywhere[slot]:
            del everywhere[slot]

    def settle(self, slots: frozenset[int], *, arrived: bool) -> None:
        """Let rows point to their uploads: those of ``slots``, and with ``arrived`` also those that are over."""
        for slot, upload in list(self._uploads.items()):
            if arrived and upload.copy.done():
                self._point(slot, upload)
            elif slot in slots:
                self._side.queue.wait(upload.copy)
                self._point(slot, upload)

    def _point(self, slot: int, upload: _Upload) -> None:
        self._put_row(slot, upload.packed.at(upload.memory.data_ptr()))
        self._held[slot] = upload.memory  # what it replaces is reused behind the row just written
        del self._uploads[slot]
        if not self._uploads:
            self._side.unsettled.discard(self)

    def _drop_upload(self, slot: int) -> None:
        upload = self._uploads.pop(slot, None)
        if upload is not None:
            self._side.queue.wait(upload.copy)  # else its memory would be given out while it is being written
        if not self._uploads:
            self._side.unsettled.discard(self)

    def _nbytes(self, slot: int) -> int:
        upload = self._uploads.get(slot)
        if upload is not None:
            return upload.memory.nbytes
        return self._held[slot].nbytes if slot in self._held else 0

    def _reserve_row(self, slot: int) -> None:
        """Make the table long enough. The kernels' root then names the new rows; the old ones outlive their readers."""
        capacity, words = self._host_rows.shape
        if slot < capacity:
            return
        grown = np.zeros((max(FEWEST_ROWS, 2 * capacity, slot + 1), words), dtype=np.int64)
        grown[:capacity] = self._host_rows
        rows = self._side.queue.allocate(grown.nbytes).view(torch.int64).view(grown.shape)
        self._put(rows, grown)
        self._put(self.root, np.array([rows.data_ptr(), len(grown)], dtype=np.int64))
        self._host_rows, self._rows = grown, rows

    def _put_row(self, slot: int, row: list[int]) -> None:
        self._host_rows[slot] = row
        self._put(self._rows[slot], self._host_rows[slot])

    def _put(self, target: torch.Tensor, values: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> None:
        words = self._side.queue.host(values.nbytes).view(torch.int64).view(values.shape)
        words.copy_(torch.from_numpy(values))
        self._side.queue.put(target, words)
