"""The device backends of the lora op on a GPU: captured graphs, poisoned memory, uploads beside steps, a full card."""

from __future__ import annotations

import pytest
import torch

from loraplex_kernels.lora import LoraTable, PartDelta, SlotDelta
from loraplex_kernels.lora.device import DeviceLora
from loraplex_kernels.lora.device_launch import GridKernels, Launch
from loraplex_kernels.lora.uploads import CudaQueue
from loraplex_kernels.segments import SegmentPlan, Term, plan_rows
from loraplex_kernels.testing import decode_plan, expected_output, mixed_slots, random_factors, worst_excess
from tests.ops.lora_device import POISON
from tests.ops.lora_subjects import BIG, CUDA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]

IN, PARTS = 512, (384, 128, 120)
WIDTH = sum(PARTS)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class PoisonedCudaQueue(CudaQueue):
    """Memory is full of NaN until something is copied there; keeps it all, to poison it again."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.blocks: dict[int, torch.Tensor] = {}

    def allocate(self, nbytes: int) -> torch.Tensor:
        block = super().allocate(nbytes).fill_(POISON)
        self.blocks[block.data_ptr()] = block
        return block

    def run(self, launch: Launch) -> None:
        """Launch a kernel on a scratch full of NaN."""
        if "CHUNK" in launch.options and not torch.cuda.is_current_stream_capturing():
            arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
            self.blocks[int(arguments["header"][0])].fill_(POISON)
        launch()


@pytest.fixture(params=[False, True], ids=["triton", "triton-fused"])
def backend(request: pytest.FixtureRequest) -> DeviceLora:
    from loraplex_kernels.lora.triton import KERNELS

    queue = PoisonedCudaQueue(CUDA)
    return DeviceLora("", GridKernels(KERNELS, fused=request.param, launcher=queue.run), lambda device: queue)


def table_of(backend: DeviceLora, dtype: torch.dtype, slots: dict[int, SlotDelta]) -> LoraTable:
    table = backend.new_table(IN, PARTS, dtype=dtype, device=CUDA, max_bytes=BIG)
    for slot, delta in slots.items():
        table.write(slot, table.pack(delta))
    return table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_serves_other_adapters_than_at_capture(
    backend: DeviceLora, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Bit-equal to eager launches, after slots appeared, ranks grew and slot rows and scratch moved."""
    slots = mixed_slots(40, IN, PARTS, dtype, generator)
    tables = [table_of(backend, dtype, {0: slots[0], 1: slots[1]}) for _ in range(2)]
    static = backend.static_plan(64, 100)
    assert static is not None
    x = torch.randn(64, IN, generator=generator).to(CUDA, dtype)
    start = torch.randn(64, WIDTH, generator=generator).to(CUDA, dtype)
    ys = [start.clone() for _ in tables]

    def step() -> None:
        for table, y in zip(tables, ys, strict=True):
            y.copy_(start)
            table.add_(y, x, static)

    assert static.set(decode_plan([0]))
    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for slot in (2, 5, 7, 39):
        for table in tables:
            table.write(slot, table.pack(slots[slot]))
    tables[1].clear(1)
    held = [{slot: slots[slot] for slot in (0, 1, 2, 5, 7, 39)}]
    held.append({slot: delta for slot, delta in held[0].items() if slot != 1})
    for plan in (
        plan_rows([(1, (Term(7, 0.5), Term(39), Term(1))), (17, (Term(39),)), (2, ()), (20, (Term(2),))]),
        plan_rows([(3, ())]),
        decode_plan([0, 2, 5, 7, 39] * 12),
        plan_rows([(64, (Term(5),))]),
    ):
        assert static.set(plan)
        for y in ys:
            y.fill_(float("nan"))
        graph.replay()
        padded = SegmentPlan(64, plan.segments)
        for table, y, known in zip(tables, ys, held, strict=True):
            eager = start.clone()
            table.add_(eager, x, backend.prepare(padded))
            assert torch.equal(y, eager)
            expected = expected_output(start.cpu(), x.cpu(), padded, known, PARTS)
            assert worst_excess(y.cpu(), expected, dtype) <= 1


def test_many_steps_in_flight_keep_their_own_metadata(backend: DeviceLora, generator: torch.Generator) -> None:
    """``set`` may run far ahead of the device."""
    slots = {slot: SlotDelta((PartDelta(shift=torch.full((384,), float(slot))), None, None)) for slot in range(8)}
    table = table_of(backend, torch.float32, slots)
    static = backend.static_plan(1, 1)
    assert static is not None
    x, outs = torch.zeros(1, IN, device=CUDA), []
    for step in range(64):
        if step == 1:
            torch.cuda._sleep(50_000_000)
        assert static.set(decode_plan([step % 8]))
        outs.append(torch.zeros(1, WIDTH, device=CUDA))
        table.add_(outs[-1], x, static)
    assert [int(out[0, 0]) for out in outs] == [step % 8 for step in range(64)]


def test_uploads_beside_running_steps(backend: DeviceLora, generator: torch.Generator) -> None:
    """Steps go on with what they have; the first step of a new adapter waits for it; memory is reused in order."""
    dtype = torch.bfloat16
    rank, running = 64, SlotDelta((PartDelta(shift=torch.ones(384)), None, None))
    table = table_of(backend, dtype, {0: running})
    x = torch.randn(4, IN, generator=generator).to(CUDA, dtype)
    for _ in range(20):
        parts = [PartDelta(random_factors(rank, IN, size, generator)) for size in PARTS]
        slots = {0: running, 1: SlotDelta(tuple(parts))}
        torch.cuda._sleep(2_000_000)
        table.write(1, table.pack(slots[1]))
        fence = backend.fence()
        results = []
        for plan in (decode_plan([0] * 4), decode_plan([0, 1, 1, 0])):
            y = torch.zeros(4, WIDTH, device=CUDA, dtype=dtype)
            table.add_(y, x, backend.prepare(plan))
            results.append((plan, y))
        for plan, y in results:
            expected = expected_output(torch.zeros(4, WIDTH), x.cpu(), plan, slots, PARTS)
            assert worst_excess(y.cpu(), expected, dtype) <= 1
        assert fence.done()
        table.clear(1)


def test_a_full_card_is_a_memory_error_and_the_slot_stays(backend: DeviceLora, generator: torch.Generator) -> None:
    table = table_of(backend, torch.float32, {0: SlotDelta((PartDelta(shift=torch.ones(384)), None, None))})
    large = table.pack(SlotDelta(tuple(PartDelta(random_factors(30_000, IN, size, generator)) for size in PARTS)))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    used, total = torch.cuda.memory_reserved(CUDA), torch.cuda.mem_get_info(CUDA)[1]
    torch.cuda.set_per_process_memory_fraction((used + 50_000_000) / total, CUDA)
    try:
        with pytest.raises(MemoryError, match=r"cuda:0 has no room for \d+ bytes: \d+ of its \d+ bytes are free"):
            table.write(0, large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    y = torch.zeros(1, WIDTH, device=CUDA)
    table.add_(y, torch.zeros(1, IN, device=CUDA), backend.prepare(decode_plan([0])))
    assert y.sum().item() == 384
