"""The device backend of quantized products on a GPU: every stored form and size of step, captured graphs, races."""

from __future__ import annotations

import pytest
import torch

from loraplex_kernels.lora import LoraTable
from loraplex_kernels.lora.device import DeviceLora
from loraplex_kernels.lora.device_launch import GridKernels
from loraplex_kernels.quant.device import DeviceMatrix, DeviceQuant
from loraplex_kernels.quant.device_launch import QuantKernels
from loraplex_kernels.quant.stored import StoredMatrix, decode
from loraplex_kernels.segments import SegmentPlan, Term, plan_rows
from loraplex_kernels.testing import decode_plan, mixed_slots, worst_excess
from tests.ops.lora_subjects import BIG, CUDA
from tests.ops.stored_matrices import FORMS, stored_matrix
from tests.ops.test_lora_gpu import PoisonedCudaQueue

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]

IN, PARTS = 2048, (384, 128, 77)
WIDTH = sum(PARTS)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = (1, 8, 17, 40, 64, 65, 300)


@pytest.fixture
def quant() -> DeviceQuant:
    from loraplex_kernels.quant.triton import KERNELS

    return DeviceQuant("triton", QuantKernels(KERNELS), PoisonedCudaQueue)


def parts_of(form: str) -> tuple[StoredMatrix, ...]:
    return tuple(stored_matrix(form, size, IN, seed) for seed, size in enumerate(PARTS))


def matrix_of(quant: DeviceQuant, parts: tuple[StoredMatrix, ...], dtype: torch.dtype) -> DeviceMatrix:
    matrix = quant.matrix([part.to(CUDA) for part in parts], dtype)
    assert isinstance(matrix, DeviceMatrix)
    return matrix


def draw(rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(rows)).to(CUDA, dtype)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        *((form, torch.bfloat16) for form in FORMS),
        *((form, dtype) for form in ("nf4-rounded", "uint6-super", "e4m3-block") for dtype in DTYPES[1:]),
    ],
    ids=str,
)
def test_products_and_weights_of_every_form(quant: DeviceQuant, form: str, dtype: torch.dtype) -> None:
    parts = parts_of(form)
    matrix = matrix_of(quant, parts, dtype)
    weights = torch.cat([decode(part, dtype) for part in parts])
    assert torch.equal(matrix.dequantize().cpu(), weights)
    ids = torch.tensor([0, WIDTH - 1, 383, 384, 7, 7])
    assert torch.equal(matrix.look_up(ids.to(CUDA)).cpu(), weights[ids])
    bias = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    for rows in ROWS if form in ("nf4-rounded", "uint6-super") else (1, 40, 65):
        x = draw(rows, dtype)
        expected = x.cpu().double() @ weights.double().T + bias.double()
        assert worst_excess(matrix.multiply(x, bias.to(CUDA)).cpu(), expected, dtype) <= 1


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_the_same_bits_whatever_the_order_of_programs(quant: DeviceQuant, rows: int) -> None:
    """Splits that meet in another order, on planes that other products have used since."""
    matrix = matrix_of(quant, parts_of("nf4-rounded"), torch.bfloat16)
    other = matrix_of(quant, parts_of("uint4-zeros"), torch.bfloat16)
    x = draw(rows, torch.bfloat16)
    first = matrix.multiply(x, None)
    for _ in range(200):
        other.multiply(x, None)
        assert torch.equal(matrix.multiply(x, None), first)


def test_nothing_of_one_row_reaches_another(quant: DeviceQuant) -> None:
    matrix = matrix_of(quant, parts_of("nf4-rounded"), torch.bfloat16)
    for rows in (9, 150):
        x = draw(rows, torch.bfloat16)
        clean = matrix.multiply(x, None)
        others = [row for row in range(rows) if row != 1]
        for poison in (float("nan"), float("inf")):
            spoiled = x.clone()
            spoiled[1] = poison
            assert torch.equal(matrix.multiply(spoiled, None)[others], clean[others])


class JoinedLayer:
    """A quantized layer whose adapters' slots may change."""

    def __init__(self, quant: DeviceQuant, dtype: torch.dtype, generator: torch.Generator) -> None:
        from loraplex_kernels.lora.triton import KERNELS

        self.lora = DeviceLora("triton-fused", GridKernels(KERNELS, fused=True), PoisonedCudaQueue)
        self.matrix = matrix_of(quant, parts_of("nf4-rounded"), dtype)
        self.table: LoraTable = self.lora.new_table(IN, PARTS, dtype=dtype, device=CUDA, max_bytes=BIG)
        self.slots = mixed_slots(40, IN, PARTS, dtype, generator)
        join = self.matrix.join(self.table)
        assert join is not None
        self.join = join

    def load(self, *slots: int) -> None:
        for slot in slots:
            self.table.write(slot, self.table.pack(self.slots[slot]))

    def apart(self, x: torch.Tensor, plan: SegmentPlan) -> torch.Tensor:
        y = self.matrix.multiply(x, None)
        self.table.add_(y, x, self.lora.prepare(plan))
        return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_launch_has_the_bits_of_two(quant: DeviceQuant, dtype: torch.dtype, generator: torch.Generator) -> None:
    layer = JoinedLayer(quant, dtype, generator)
    layer.load(*range(40))
    for plan in (
        decode_plan([7]),
        decode_plan([0, None, 3, 3, 7]),
        plan_rows([(1, (Term(slot),)) for slot in range(32)]),
        plan_rows([(20, (Term(39, 0.5), Term(5))), (4, ()), (40, (Term(2),))]),
    ):
        x = draw(plan.num_rows, dtype)
        prepared, wanted = layer.lora.prepare(plan), layer.apart(x, plan)
        for _ in range(50):
            assert torch.equal(layer.join(x, x, None, prepared), wanted)


def test_a_graph_serves_other_adapters_than_at_capture(quant: DeviceQuant, generator: torch.Generator) -> None:
    layer = JoinedLayer(quant, torch.bfloat16, generator)
    layer.load(0, 1)
    static = layer.lora.static_plan(32, 64)
    assert static is not None
    assert static.set(decode_plan([0]))
    x = draw(32, torch.bfloat16)
    layer.join(x, x, None, static)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer.join(x, x, None, static)
    layer.load(2, 5, 7, 39)
    layer.table.clear(1)
    for plan in (
        decode_plan([7, 2, 5, 39] * 8),
        plan_rows([(3, ())]),
        plan_rows([(1, (Term(7, 0.5), Term(39))), (17, (Term(2),)), (2, ()), (12, (Term(0),))]),
    ):
        assert static.set(plan)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, layer.apart(x, SegmentPlan(32, plan.segments)))
