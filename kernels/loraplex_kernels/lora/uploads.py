"""How bytes get to a device: in the order of its launched work, or beside it. Knows nothing of adapters.

Memory is always taken on the compute stream, the stream that steps are launched on: the allocator gives freed memory
out again in that stream's order, so whoever drops a tensor needs to wait for nothing but its own copies.
"""

from __future__ import annotations

from typing import Protocol

import torch

from loraplex_kernels.lora.fence import AlwaysDone


class Copy(Protocol):
    """Bytes on their way."""

    def done(self) -> bool:
        """Whether they have arrived; never waits."""
        ...


class DeviceQueue(Protocol):
    """One device's launched work, in its order, and copies beside it."""

    device: torch.device

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Uninitialised uint8 memory. Raises MemoryError, with numbers, when the device has no room."""
        ...

    def host(self, nbytes: int) -> torch.Tensor:
        """Uninitialised uint8 host memory that the device can copy from by itself; any thread may ask."""
        ...

    def put(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy from ``host`` memory behind all work launched so far and before all launched later."""
        ...

    def copy_beside(self, target: torch.Tensor, source: torch.Tensor) -> Copy:
        """Start to copy from ``host`` memory into what ``allocate`` has just given, beside the launched work."""
        ...

    def wait(self, copy: Copy) -> None:
        """Let all work launched later, and reuse of the target once it is dropped, come after the copy."""
        ...


class DirectQueue:
    """Where work is done as it is launched: the CPU, in Triton's interpreter."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def host(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def put(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def copy_beside(self, target: torch.Tensor, source: torch.Tensor) -> Copy:
        target.copy_(source)
        return AlwaysDone()

    def wait(self, copy: Copy) -> None:
        del copy


class _CudaCopy:
    """A copy on the side stream, and the event behind it."""

    __slots__ = ("event",)

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]


class CudaQueue:
    """A CUDA device: the current stream computes, a stream of our own uploads.

    torch's pinned-memory allocator keeps a host block from being reused until the copies that read it are over, so a
    buffer may be dropped as soon as its copy is launched: that is the ring of buffers that a step's metadata needs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def allocate(self, nbytes: int) -> torch.Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.device)
            raise MemoryError(
                f"{self.device} has no room for {nbytes} bytes: {free} of its {total} bytes are free, "
                f"{torch.cuda.memory_reserved(self.device)} are reserved by this process"
            ) from error

    def host(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def put(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def copy_beside(self, target: torch.Tensor, source: torch.Tensor) -> Copy:
        taken = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        taken.record(torch.cuda.current_stream(self.device))  # what used this memory before is ahead of it
        with torch.cuda.stream(self._side):
            self._side.wait_event(taken)
            target.copy_(source, non_blocking=True)
            arrived.record(self._side)
        return _CudaCopy(arrived)

    def wait(self, copy: Copy) -> None:
        assert isinstance(copy, _CudaCopy)
        torch.cuda.current_stream(self.device).wait_event(copy.event)


def queue_for(device: torch.device) -> DeviceQueue:
    """The queue of a device that a backend of this op can run on."""
    return CudaQueue(device) if device.type == "cuda" else DirectQueue(device)
