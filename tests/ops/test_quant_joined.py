"""One launch for a quantized layer and its adapters: the bits of two, whatever adapters come and go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loraplex.layers.linear import Linear, LinearParts
from loraplex.parallel.group import solo
from loraplex.parallel.shard import Shard
from loraplex.quant.loading import QuantizedWeight
from loraplex_kernels.lora import LoraTable, PartDelta, SlotDelta
from loraplex_kernels.lora.device import DeviceLora
from loraplex_kernels.quant.device import JOINED_ROWS, DeviceMatrix, DeviceQuant
from loraplex_kernels.quant.reference import ReferenceQuant
from loraplex_kernels.segments import SegmentPlan, Term, plan_rows
from loraplex_kernels.testing import decode_plan, expected_output, mixed_slots, random_scale, worst_excess
from tests.fakes_rows import linear_rows
from tests.ops.lora_device import SMALL_FORMS, make_lora
from tests.ops.lora_subjects import BIG, CPU
from tests.ops.quant_device import Launches, make_quant, product
from tests.ops.stored_matrices import stored_matrix

triton = pytest.importorskip("triton", reason="the package triton is not installed")

F32 = torch.float32
IN, PARTS = 128, (37, 20)
WIDTH = sum(PARTS)
TERMS = plan_rows([(2, (Term(0, 0.5), Term(3, -1.5))), (1, (Term(1),)), (3, ()), (1, (Term(7, 2.0), Term(5)))])


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dots whose bits do not hang on how many rows there are beside a row, as NumPy's float32 ones do on
    processors without AVX-512: summed in float64, in which another order is rounded off."""
    from loraplex_kernels.quant.triton import KERNELS

    if not KERNELS.interpreted:
        pytest.skip("kernels are compiled for the GPU of this machine; these tests are of the interpreter")
    from triton.runtime import interpreter as triton_interpreter

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return np.matmul(a, b, dtype=np.float64).astype(dtype)

    monkeypatch.setattr(triton_interpreter, "np", SimpleNamespace(**(vars(np) | {"matmul": matmul})))


class Layer:
    """A quantized layer and its table, on backends that record their launches in one place."""

    def __init__(
        self, generator: torch.Generator, forms: Sequence[str] = ("nf4", "nf4"), *, fused: bool = True
    ) -> None:
        self.launches = Launches()
        self.quant: DeviceQuant = make_quant(launcher=self.launches)
        self.lora: DeviceLora = make_lora(fused=fused, forms=SMALL_FORMS, recorder=self.launches)
        self.parts = tuple(stored_matrix(form, size, IN, seed=size) for form, size in zip(forms, PARTS, strict=True))
        self.matrix = self.quant.matrix(self.parts, F32)
        self.slots = mixed_slots(8, IN, PARTS, F32, generator)
        vectors = tuple(PartDelta(None, random_scale(size, generator), torch.ones(size)) for size in PARTS)
        self.slots[5] = SlotDelta(vectors, random_scale(IN, generator))
        self.table: LoraTable = self.lora.new_table(IN, PARTS, dtype=F32, device=CPU, max_bytes=BIG)
        self.held: dict[int, SlotDelta] = {}

    def load(self, *slots: int) -> None:
        for slot in slots:
            self.table.write(slot, self.table.pack(self.slots[slot]))
            self.held[slot] = self.slots[slot]

    def base(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product without adapters, by the formula."""
        return product(self.parts, x, bias, F32)

    def apart(self, x: torch.Tensor, bias: torch.Tensor | None, plan: SegmentPlan) -> torch.Tensor:
        """By two launches."""
        prepared = self.lora.prepare(plan)
        y = self.matrix.multiply(self.table.scale_input(x, prepared), bias)
        self.table.add_(y, x, prepared)
        return y


@pytest.fixture
def layer(generator: torch.Generator) -> Layer:
    made = Layer(generator)
    made.load(*range(8))
    return made


def draw(rows: int) -> torch.Tensor:
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize(
    "plan",
    [TERMS, decode_plan([5, None, 2]), plan_rows([(21, (Term(2),)), (3, ()), (2, (Term(4), Term(5)))])],
    ids=["mixed", "vectors", "tiles"],
)
def test_one_launch_has_the_bits_of_two(layer: Layer, plan: SegmentPlan) -> None:
    join = layer.matrix.join(layer.table)
    assert join is not None
    x, bias = draw(plan.num_rows), torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    prepared = layer.lora.prepare(plan)
    scaled = layer.table.scale_input(x, prepared)
    layer.launches.launches.clear()
    y = join(scaled, x, bias, prepared)
    assert layer.launches.names() == ["joined"]
    assert torch.equal(y, layer.apart(x, bias, plan))
    assert worst_excess(y, expected_output(layer.base(scaled, bias), x, plan, layer.slots, PARTS), F32) <= 1


def test_order_of_columns_is_the_matrix_s_alone(generator: torch.Generator) -> None:
    layer = Layer(generator, ("uint4-order", "uint4-order"))
    first, second = layer.parts
    assert layer.matrix.join(layer.table) is None, "an order each: two launches for the matrix alone"
    assert first.order is not None
    layer.parts = (first, replace(second, order=first.order.clone()))
    layer.matrix = layer.quant.matrix(layer.parts, F32)
    layer.load(2)
    join = layer.matrix.join(layer.table)
    assert join is not None
    x, plan = draw(2), decode_plan([2, None])
    y = join(x, x, None, layer.lora.prepare(plan))
    assert worst_excess(y, expected_output(layer.base(x), x, plan, layer.slots, PARTS), F32) <= 1


def test_a_replay_serves_other_adapters_than_the_capture(generator: torch.Generator) -> None:
    layer = Layer(generator)
    layer.load(0, 1)
    join = layer.matrix.join(layer.table)
    assert join is not None
    static = layer.lora.static_plan(6, 12)
    assert static is not None
    assert static.set(decode_plan([0]))
    x = draw(6)
    y = join(x, x, None, static)
    assert layer.launches.names() == ["joined"]
    layer.load(2, 7)
    layer.table.clear(1)
    del layer.held[1]
    for plan in (
        plan_rows([(1, (Term(7, 0.5), Term(2))), (2, ()), (1, (Term(0),))]),
        plan_rows([(3, ())]),
        plan_rows([(6, (Term(2),))]),
    ):
        assert static.set(plan)
        y.fill_(float("nan"))
        layer.launches.replay()
        padded = SegmentPlan(6, plan.segments)
        assert torch.equal(y, layer.apart(x, None, padded))
        assert worst_excess(y, expected_output(layer.base(x), x, padded, layer.held, PARTS), F32) <= 1
        del layer.launches.launches[1:]


def test_steps_that_one_launch_is_not_for(layer: Layer) -> None:
    other = layer.lora.new_table(1, (1,), dtype=F32, device=CPU, max_bytes=BIG)
    other.write(9, other.pack(SlotDelta((PartDelta(shift=torch.ones(1)),))))
    join = layer.matrix.join(layer.table)
    assert join is not None
    for plan, launches in (
        (decode_plan([9, 9]), ["product"]),
        (plan_rows([(JOINED_ROWS + 1, (Term(2),))]), ["product", "fused"]),
        (plan_rows([]), []),
    ):
        x = draw(plan.num_rows)
        layer.launches.launches.clear()
        y = join(x, x, None, layer.lora.prepare(plan))
        assert layer.launches.names() == launches
        wanted = expected_output(layer.base(x), x, plan, layer.slots | {9: SlotDelta((None, None))}, PARTS)
        assert worst_excess(y, wanted, F32) <= 1


def test_what_cannot_join_says_so(generator: torch.Generator, layer: Layer) -> None:
    assert Layer(generator, fused=False).matrix.join(Layer(generator, fused=False).table) is None
    unlike = Layer(generator, ("nf4", "int8"))
    assert unlike.matrix.join(unlike.table) is None
    for in_features, parts, dtype in ((IN, (WIDTH,), F32), (IN + 1, PARTS, F32), (IN, PARTS, torch.float16)):
        table = layer.lora.new_table(in_features, parts, dtype=dtype, device=CPU, max_bytes=BIG)
        assert layer.matrix.join(table) is None
    assert ReferenceQuant().matrix(layer.parts, F32).join(layer.table) is None


def test_a_layer_joins_where_it_can(layer: Layer) -> None:
    assert isinstance(layer.matrix, DeviceMatrix)
    rows = tuple(linear_rows(size, IN) for size in PARTS)
    parts = LinearParts(QuantizedWeight(layer.matrix), None, layer.table, rows)
    linear = Linear(("m.q_proj", "m.k_proj"), parts, Shard.COLUMN, solo())
    for plan, launches in ((TERMS, ["scale", "joined"]), (decode_plan([None, None]), ["product"])):
        x = draw(plan.num_rows)
        layer.launches.launches.clear()
        y = linear(x, layer.lora.prepare(plan))
        assert layer.launches.names() == launches
        assert torch.equal(y, layer.apart(x, None, plan))
