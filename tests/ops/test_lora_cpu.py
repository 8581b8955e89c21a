"""The lora op on a CPU beyond the contract: its kernel takes part, reads no wrong memory, and keeps to its bytes."""

from __future__ import annotations

import psutil
import pytest
import torch

from loraplex_kernels.backend import choose_lora
from loraplex_kernels.cpu_ir import has_kernel
from loraplex_kernels.lora import Factors, PartDelta, SlotDelta
from loraplex_kernels.lora.cpu import CpuLora, CpuTable
from loraplex_kernels.segments import Term, plan_rows
from loraplex_kernels.testing import decode_plan
from tests.ops.lora_subjects import BIG, CPU


def delta(rank: int, in_features: int, out_features: int) -> SlotDelta:
    """Ones."""
    return SlotDelta((PartDelta(Factors(torch.ones(rank, in_features), torch.ones(out_features, rank))),))


@pytest.mark.parametrize(
    ("y", "x"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.float64)),
        (torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 4)),
        (torch.zeros(3, 2).t(), torch.zeros(2, 4)),
        (torch.zeros(2, 3), torch.zeros(2, 5)),
    ],
    ids=["x type", "y type", "y transposed", "x too wide"],
)
def test_the_compiled_kernel_is_never_given_wrong_memory(y: torch.Tensor, x: torch.Tensor) -> None:
    if not has_kernel(torch.float32):
        pytest.skip("this processor lacks AVX-512")
    backend = choose_lora("cpu", CPU)
    table = backend.new_table(4, (3,), dtype=torch.float32, device=CPU, max_bytes=BIG)
    table.write(0, table.pack(delta(1, 4, 3)))
    with pytest.raises(ValueError, match="the table needs"):
        table.add_(y, x, backend.prepare(decode_plan([0, 0])))


@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, 4, dtype=torch.bfloat16), torch.zeros(2, 5), torch.zeros(1, 4)],
    ids=["type", "too wide", "too few rows"],
)
def test_the_kernel_of_scales_is_never_given_wrong_memory(x: torch.Tensor) -> None:
    if not has_kernel(torch.float32):
        pytest.skip("this processor lacks AVX-512")
    backend = choose_lora("cpu", CPU)
    table = backend.new_table(4, (3,), dtype=torch.float32, device=CPU, max_bytes=BIG)
    table.write(0, table.pack(SlotDelta((PartDelta(shift=torch.ones(3)),), torch.ones(4))))
    plan = backend.prepare(decode_plan([0, 0]))
    with pytest.raises(ValueError, match=r"rows to scale and shift are .*; the table needs them in torch\.float32"):
        table.scale_input(x, plan)
    with pytest.raises(ValueError, match="rows to scale and shift are"):
        table.add_(torch.zeros(3, 2).t(), torch.zeros(2, 4), plan)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_alone_keeps_the_signs_of_zeros(compiled: bool, dtype: torch.dtype) -> None:
    backend = CpuLora(compiled=compiled)
    table = backend.new_table(4, (3, 2), dtype=dtype, device=CPU, max_bytes=BIG)
    table.write(0, table.pack(SlotDelta((PartDelta(None, torch.full((3,), 2.0)), None))))
    y = torch.full((2, 5), -0.0, dtype=dtype)
    table.add_(y, torch.zeros(2, 4, dtype=dtype), backend.prepare(decode_plan([0, 0])))
    assert y.signbit().all()


def test_a_table_keeps_to_its_bytes() -> None:
    table = CpuLora().new_table(16, (16,), dtype=torch.float32, device=CPU, max_bytes=512)
    packed = table.pack(delta(2, 16, 16))
    assert packed.nbytes == 256
    odd = CpuLora().new_table(15, (15,), dtype=torch.float32, device=CPU, max_bytes=512)
    assert odd.pack(delta(1, 15, 15)).nbytes == 256, "what is rounded up counts"
    for slot in (0, 1, 0):
        table.write(slot, packed)
    with pytest.raises(MemoryError, match=r"slot 2: 256 bytes .* 512 of the table's 512 bytes"):
        table.write(2, packed)
    with pytest.raises(MemoryError, match=r"slot 1: 512 bytes .* 256 of the table's 512 bytes"):
        table.write(1, table.pack(delta(4, 16, 16)))
    table.clear(0)
    table.write(2, packed)


def test_the_compiled_kernel_takes_part() -> None:
    """On a processor that has it; elsewhere the contract's tests would pass without it."""
    if not has_kernel(torch.bfloat16):
        pytest.skip("this processor lacks AVX512-BF16")
    table = CpuLora().new_table(64, (48,), dtype=torch.bfloat16, device=CPU, max_bytes=BIG)
    assert isinstance(table, CpuTable)
    table.write(0, table.pack(delta(4, 64, 48)))
    plan = decode_plan([0, 0])
    assert table.split(plan) == (1, 0)
    assert table.split(plan_rows([(1 << 20, (Term(0),))])) == (0, 1)


def test_a_write_copies_nothing() -> None:
    """An adapter that is on the host is in memory once, however often it is written."""
    table = CpuLora().new_table(1 << 16, (1 << 16,), dtype=torch.float32, device=CPU, max_bytes=BIG)
    packed = table.pack(delta(64, 1 << 16, 1 << 16))
    assert packed.nbytes == 1 << 25
    before = psutil.Process().memory_info().rss
    for slot in range(4):
        table.write(slot, packed)
    assert psutil.Process().memory_info().rss - before < packed.nbytes // 4
