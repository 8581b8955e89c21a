"""Both ends of the vocabulary with adapters' own rows, added tokens among them, against dense float64."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from loraplex.layers.embedding import Changes, Embedding, Head
from loraplex.layers.rows import Rows, RowsForm
from loraplex.parallel.group import solo
from loraplex.quant.dense import PlainWeight, dense_weight
from loraplex_kernels.backend import choose_lora
from loraplex_kernels.testing import expected_input, expected_output, worst_excess
from tests.fakes_rows import CPU, PLANS, WORLDS, World

HIDDEN = 24
VOCAB = 20
ADDED = 3
#: some old tokens and all new ones; new ones alone; old ones alone
INDICES = {
    2: torch.tensor([1, 7, *range(VOCAB, VOCAB + ADDED)]),
    3: torch.arange(VOCAB, VOCAB + 1),
    4: torch.tensor([0, VOCAB - 1]),
}


@pytest.fixture(params=WORLDS, ids=str)
def world(request: pytest.FixtureRequest) -> World:
    name, dtype = request.param
    return World(choose_lora(name, CPU), dtype)


def vocabulary_rows(world: World) -> dict[int, Rows]:
    """Slot 1 replaces all, slot 5 replaces and adds."""
    rows = {slot: Rows(world.randn(len(indices), HIDDEN), indices) for slot, indices in INDICES.items()}
    return {1: Rows(world.randn(VOCAB, HIDDEN)), 5: Rows(world.randn(VOCAB + 2, HIDDEN)), **rows}


def reach(rows: Mapping[int, Rows], slot: int) -> int:
    if slot not in rows:
        return VOCAB
    indices = rows[slot].indices
    return len(rows[slot].values) if indices is None else max(VOCAB, int(indices[-1]) + 1)


def wide(weight: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    """The base's matrix with own rows in it and behind it, float64."""
    if rows is None:
        return weight.double()
    if rows.indices is None:
        return rows.values.double()
    out = torch.zeros(max(VOCAB, int(rows.indices[-1]) + 1), HIDDEN, dtype=torch.float64)
    out[:VOCAB] = weight.double()
    out[rows.indices] = rows.values.double()
    return out


@pytest.mark.parametrize("name", PLANS)
def test_tokens_are_looked_up_in_their_adapters_rows(name: str, world: World) -> None:
    plan, weight, rows = PLANS[name], world.randn(VOCAB, HIDDEN), vocabulary_rows(world)
    table = world.lora.new_table(VOCAB, (HIDDEN,), dtype=world.dtype, device=CPU, max_bytes=1 << 20)
    slots = {slot: world.delta(VOCAB, (HIDDEN,), in_scale=False) for slot in (0, 2)}
    for slot, delta in slots.items():
        table.write(slot, table.pack(delta))
    own = world.rows_table(RowsForm.LOOKED_UP, VOCAB, HIDDEN, grows=True)
    for slot, one in rows.items():
        own.write(slot, own.pack(one))
    layer = Embedding("embed_tokens", PlainWeight(weight), Changes(table, own), slice(0, VOCAB), solo())
    for seed in range(4):  # each row meets own tokens, new tokens and the base's
        ids = torch.randint(VOCAB, (plan.num_rows,), generator=torch.Generator().manual_seed(seed))
        base = weight[ids].double()
        new = torch.zeros(plan.num_rows, dtype=torch.bool)
        for segment in plan.segments:
            for term in segment.terms:
                if term.slot in rows:
                    for row in range(segment.start, segment.stop):
                        choices = rows[term.slot].indices
                        if (row + seed) % 2:
                            ids[row] = (
                                reach(rows, term.slot) - 1
                                if choices is None
                                else choices[(row * 3 + seed) % len(choices)]
                            )
                        base[row] = wide(weight, rows[term.slot])[ids[row]]
                        new[row] = ids[row] >= VOCAB
        one_hot = torch.nn.functional.one_hot(ids.clamp(max=VOCAB - 1), VOCAB)
        expected = torch.where(new.unsqueeze(1), base, expected_output(base, one_hot, plan, slots, (HIDDEN,)))
        given = ids.clone()
        got = layer(given, world.lora.prepare(plan))
        assert worst_excess(got, expected, world.dtype) <= 1
        assert torch.equal(given, ids)


@pytest.mark.parametrize("name", PLANS)
def test_logits_are_as_wide_as_the_widest_and_minus_infinity_past_a_rows_own(name: str, world: World) -> None:
    plan, weight, rows = PLANS[name], world.randn(VOCAB, HIDDEN), vocabulary_rows(world)
    table = world.lora.new_table(HIDDEN, (VOCAB,), dtype=world.dtype, device=CPU, max_bytes=1 << 20)
    slots = {slot: world.delta(HIDDEN, (VOCAB,)) for slot in (0, 2)}
    for slot, delta in slots.items():
        table.write(slot, table.pack(delta))
    own = world.rows_table(RowsForm.MULTIPLIED, VOCAB, HIDDEN, grows=True)
    for slot, one in rows.items():
        own.write(slot, own.pack(one))
    hidden = world.randn(plan.num_rows, HIDDEN)
    scaled = expected_input(hidden, plan, slots)
    num_tokens = [VOCAB] * plan.num_rows
    base = scaled @ weight.double().T
    added: dict[int, torch.Tensor] = {}
    for segment in plan.segments:
        for term in segment.terms:
            for row in range(segment.start, segment.stop) if term.slot in rows else ():
                product = wide(weight, rows[term.slot]) @ scaled[row]
                base[row], added[row] = product[:VOCAB], product[VOCAB:]
                num_tokens[row] = reach(rows, term.slot)
    expected = expected_output(base, hidden, plan, slots, (VOCAB,))
    got = Head("lm_head", dense_weight(weight), Changes(table, own), solo())(hidden, world.lora.prepare(plan))
    assert got.dtype is torch.float32
    assert got.shape == (plan.num_rows, max(num_tokens, default=VOCAB))
    assert worst_excess(got[:, :VOCAB], expected, world.dtype) <= 1
    for row, count in enumerate(num_tokens):
        assert (got[row, count:] == -torch.inf).all()
        if row in added:
            assert worst_excess(got[row, VOCAB:count], added[row], world.dtype) <= 1
