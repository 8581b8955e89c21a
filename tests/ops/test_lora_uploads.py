"""Uploads of the device backends that are still under way: no step reads them too early, none waits without need."""

from __future__ import annotations

import pytest
import torch

from loraplex_kernels.lora import PartDelta, SlotDelta
from loraplex_kernels.lora.uploads import CudaQueue
from loraplex_kernels.testing import decode_plan
from tests.ops.lora_device import DelayedQueue, make_lora
from tests.ops.lora_subjects import BIG, CPU

triton = pytest.importorskip("triton", reason="the package triton is not installed")


def shift(value: float) -> SlotDelta:
    """Adds ``value`` to every row."""
    return SlotDelta((PartDelta(shift=torch.tensor([value])),))


class World:
    """One table of one column on a device whose copies a test delays."""

    def __init__(self) -> None:
        from loraplex_kernels.lora.triton import KERNELS

        if not KERNELS.interpreted:
            pytest.skip("kernels are compiled for the GPU of this machine; these tests are of the interpreter")
        self.queue = DelayedQueue(CPU)
        self.backend = make_lora(fused=False, queue=self.queue)
        self.table = self.backend.new_table(1, (1,), dtype=torch.float32, device=CPU, max_bytes=BIG)

    def write(self, slot: int, value: float) -> int:
        """Begin an upload; its place in the order of copies."""
        self.table.write(slot, self.table.pack(shift(value)))
        return len(self.queue.copies) - 1

    def shown(self, *slots: int) -> list[float]:
        """What a step of these slots adds."""
        y = torch.zeros(len(slots), 1)
        self.table.add_(y, torch.zeros(len(slots), 1), self.backend.prepare(decode_plan(slots)))
        return y[:, 0].tolist()


@pytest.fixture
def world() -> World:
    return World()


def test_a_step_waits_for_the_uploads_it_reads_and_for_no_other(world: World) -> None:
    world.write(0, 1.0)
    assert world.shown(0) == [1.0]
    assert world.queue.copies[0].waited
    world.write(1, 2.0)
    fence = world.backend.fence()
    assert world.shown(0) == [1.0]
    assert not world.queue.copies[1].waited
    assert not fence.done()
    world.queue.copies[1].arrive()
    assert fence.done()
    assert world.shown(0, 1) == [1.0, 2.0]
    assert not world.queue.copies[1].waited, "it was over: no step waits for it"


def test_a_slot_is_replaced_when_its_upload_is_over_or_asked_for(world: World) -> None:
    world.write(0, 1.0)
    assert world.shown(0) == [1.0]
    world.write(0, 3.0)
    world.write(2, 4.0)
    world.queue.copies[2].arrive()
    assert world.shown(2) == [4.0]
    assert not world.queue.copies[1].waited
    assert world.shown(0) == [3.0]


def test_memory_is_not_given_back_while_it_is_written(world: World) -> None:
    first = world.write(0, 1.0)
    second = world.write(0, 2.0)
    assert world.queue.copies[first].waited, "replaced before it was over"
    world.table.clear(0)
    assert world.queue.copies[second].waited, "cleared before it was over"
    with pytest.raises(ValueError, match="slot 0, which holds nothing"):
        world.backend.prepare(decode_plan([0]))
    world.table.clear(0)
    world.write(0, 5.0)
    assert world.shown(0) == [5.0]


def test_a_plan_made_before_a_write_sees_what_was_written(world: World) -> None:
    world.write(0, 1.0)
    plan = world.backend.prepare(decode_plan([0]))
    world.write(0, 2.0)
    y = torch.zeros(1, 1)
    world.table.add_(y, torch.zeros(1, 1), plan)
    assert y.item() == 2.0


def test_static_plans_wait_too(world: World) -> None:
    static = None
    world.write(0, 1.0)
    static = world.backend.static_plan(2, 2)
    assert static is not None
    world.write(1, 2.0)
    assert static.set(decode_plan([0]))
    assert not world.queue.copies[1].waited
    assert static.set(decode_plan([1]))
    y = torch.zeros(2, 1)
    world.table.add_(y, torch.zeros(2, 1), static)
    assert y.tolist() == [[2.0], [0.0]]


def test_a_full_gpu_is_a_memory_error_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 90)
    queue = CudaQueue(torch.device("cuda", 0))
    with pytest.raises(MemoryError, match=r"cuda:0 has no room for 64 bytes: 5 of its 100 bytes are free, 90 are"):
        queue.allocate(64)
