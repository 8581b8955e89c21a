"""Linear, head and embedding with everything a slot may change, against dense products in float64."""

from __future__ import annotations

import pytest
import torch

from loraplex.layers.embedding import Changes, Embedding, Head
from loraplex.layers.linear import Linear, LinearParts
from loraplex.parallel.group import solo
from loraplex.parallel.shard import Shard
from loraplex.quant.dense import PlainWeight, dense_weight
from loraplex_kernels.backend import choose_lora
from loraplex_kernels.lora import LoraBackend, PartDelta, SlotDelta
from loraplex_kernels.segments import Term, plan_rows
from loraplex_kernels.testing import expected_input, expected_output, random_factors, random_scale, worst_excess
from tests.fakes_rows import linear_rows

CPU = torch.device("cpu")
IN, OUT = 24, 20
PLAN = plan_rows([(2, (Term(0),)), (1, ()), (2, (Term(0, 0.5), Term(1, -1.0))), (1, (Term(1),))])


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture(params=["cpu", "reference"])
def lora(request: pytest.FixtureRequest) -> LoraBackend:
    return choose_lora(request.param, CPU)


def make_slots(generator: torch.Generator) -> dict[int, SlotDelta]:
    """Two slots that change everything."""
    return {
        slot: SlotDelta(
            (
                PartDelta(
                    random_factors(3 + slot, IN, OUT, generator),
                    random_scale(OUT, generator),
                    torch.randn(OUT, generator=generator),
                ),
            ),
            random_scale(IN, generator),
        )
        for slot in range(2)
    }


@pytest.mark.parametrize("layer", ["linear", "head"])
def test_a_product_is_of_the_scaled_input_and_terms_of_the_plain_one(
    layer: str, lora: LoraBackend, generator: torch.Generator
) -> None:
    slots = make_slots(generator)
    table = lora.new_table(IN, (OUT,), dtype=torch.float32, device=CPU, max_bytes=1 << 20)
    for slot, delta in slots.items():
        table.write(slot, table.pack(delta))
    weight, bias = torch.randn(OUT, IN, generator=generator), torch.randn(OUT, generator=generator)
    x = torch.randn(PLAN.num_rows, IN, generator=generator)
    given = x.clone()
    base = expected_input(x, PLAN, slots) @ weight.double().T
    plan = lora.prepare(PLAN)
    if layer == "linear":
        parts = LinearParts(dense_weight(weight), bias, table, (linear_rows(OUT, IN),))
        got = Linear(("m.q_proj",), parts, Shard.COLUMN, solo())(given, plan)
        base += bias.double()
    else:
        got = Head("lm_head", dense_weight(weight), Changes(table, linear_rows(OUT, IN)), solo())(given, plan)
    assert worst_excess(got, expected_output(base, x, PLAN, slots, (OUT,)), torch.float32) <= 1
    assert torch.equal(given, x)


def test_a_looked_up_row_is_scaled_and_shifted(lora: LoraBackend, generator: torch.Generator) -> None:
    slots = {slot: SlotDelta(delta.parts) for slot, delta in make_slots(generator).items()}
    table = lora.new_table(IN, (OUT,), dtype=torch.float32, device=CPU, max_bytes=1 << 20)
    for slot, delta in slots.items():
        table.write(slot, table.pack(delta))
    rows = torch.randn(IN, OUT, generator=generator)
    token_ids = torch.randint(IN, (PLAN.num_rows,), generator=generator)
    got = Embedding("embed_tokens", PlainWeight(rows), Changes(table, linear_rows(OUT, IN)), slice(0, IN), solo())(
        token_ids, lora.prepare(PLAN)
    )
    one_hot = torch.nn.functional.one_hot(token_ids, IN)
    assert worst_excess(got, expected_output(rows[token_ids], one_hot, PLAN, slots, (OUT,)), torch.float32) <= 1
