"""Matrices that lie below each other in one, cut each by itself: who has which rows, and in which order."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from loraplex.adapters.cut import cut
from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.engine.ranks.shares import NoBytes, SlotMark
from loraplex.errors import UnsupportedFeature
from loraplex.layers.linear import Linear, LinearParts
from loraplex.layers.rows import Rows, RowsForm, RowsSite
from loraplex.layers.rows_memory import RowsMemory
from loraplex.layers.rows_table import RowsTable
from loraplex.models.sites import Site, SiteKind
from loraplex.parallel.runs import places, put_, take
from loraplex.parallel.shard import Cut, Part, Shard, Stretch, check_group, length
from loraplex.quant.dense import dense_weight
from loraplex_kernels.lora import Factors, PartDelta, SlotDelta
from loraplex_kernels.lora.reference import ReferenceLora
from loraplex_kernels.segments import Term, plan_rows
from tests.lonely_rank import LonelyRank

HEADS, HEAD, STATE, INPUTS = 24, 2, 3, 10
INNER = HEADS * HEAD
GROUPS = (1, 2, 6, 8)
SIZES = (1, 2, 3, 4, 6, 8)
SHARED = [(groups, size) for groups in GROUPS for size in SIZES]


@dataclass(frozen=True)
class InProj:
    """z, x, B, C and dt of a state-space layer: heads, and groups that several heads share."""

    groups: int

    @property
    def cut(self) -> Cut:
        whole, shared = Stretch(INNER, HEADS), Stretch(self.groups * STATE, self.groups)
        stretches = (whole, whole, shared, shared, Stretch(HEADS, HEADS))
        return Cut(Shard.COLUMN, HEADS, "num_heads", stretches=stretches)

    @property
    def outputs(self) -> int:
        return 2 * INNER + 2 * self.groups * STATE + HEADS

    @property
    def site(self) -> Site:
        return Site("mixer.in_proj", SiteKind.LINEAR, INPUTS, self.outputs, bias=True, cut=self.cut)

    def part(self, rank: int, size: int) -> Part:
        return self.cut.part(self.outputs, INPUTS, rank, size)

    def names(self) -> list[str]:
        """What each output is: 'x of head 3, row 1'."""
        found = [f"{name} {head}.{row}" for name in "zx" for head in range(HEADS) for row in range(HEAD)]
        found += [f"{name} {group}.{row}" for name in "BC" for group in range(self.groups) for row in range(STATE)]
        return found + [f"dt {head}.0" for head in range(HEADS)]


@pytest.mark.parametrize(("groups", "size"), SHARED)
def test_each_head_finds_what_it_needs_where_it_looks(groups: int, size: int) -> None:
    """A rank's scan has as many groups as its B has, each of as many heads, and knows nothing of other ranks."""
    proj = InProj(groups)
    seen: set[int] = set()
    heads = HEADS // size
    for rank in range(size):
        part = proj.part(rank, size)
        seen.update(places(part.rows).tolist())
        names = [proj.names()[place] for place in places(part.rows)]
        shared = (len(names) - 2 * heads * HEAD - heads) // 2
        local_groups = shared // STATE
        assert len(names) == length(part.rows)
        assert shared == local_groups * STATE
        assert heads % local_groups == 0
        widths = (heads * HEAD, heads * HEAD, shared, shared, heads)
        z, x, b, c, dt = torch.split(torch.arange(len(names)), widths)
        for local in range(heads):
            head, group = rank * heads + local, (rank * heads + local) // (HEADS // groups)
            mine = local // (heads // local_groups)
            assert [names[i] for i in z[local * HEAD :][:HEAD]] == [f"z {head}.{row}" for row in range(HEAD)]
            assert [names[i] for i in x[local * HEAD :][:HEAD]] == [f"x {head}.{row}" for row in range(HEAD)]
            assert [names[i] for i in b[mine * STATE :][:STATE]] == [f"B {group}.{row}" for row in range(STATE)]
            assert [names[i] for i in c[mine * STATE :][:STATE]] == [f"C {group}.{row}" for row in range(STATE)]
            assert names[dt[local]] == f"dt {head}.0"
    assert seen == set(range(proj.outputs))


def test_runs_are_as_few_as_they_can_be() -> None:
    assert InProj(8).part(0, 1).rows == (slice(0, InProj(8).outputs),)
    # the second half of z, that of x with all of B and C behind it, and that of dt
    assert InProj(1).part(1, 2).rows == (slice(24, 48), slice(72, 102), slice(114, 126))
    # heads 0 to 5 of 24, four to a group: two of them have group 1, and blocks of two have a group each
    assert Cut(Shard.COLUMN, 24, stretches=(Stretch(18, 6),)).part(18, 1, 0, 4).rows == (slice(0, 3), slice(0, 6))
    assert Cut(Shard.COLUMN, 24, stretches=(Stretch(18, 6),)).part(18, 1, 1, 4).rows == (slice(3, 9), slice(6, 9))


def test_a_packed_pair_is_cut_into_two() -> None:
    pair = Cut(Shard.COLUMN, 6, "intermediate_size", stretches=(Stretch(6, 6), Stretch(6, 6)))
    assert [pair.part(12, 4, rank, 3).rows for rank in range(3)] == [
        (slice(0, 2), slice(6, 8)),
        (slice(2, 4), slice(8, 10)),
        (slice(4, 6), slice(10, 12)),
    ]


def test_sizes_that_heads_do_not_allow_are_refused() -> None:
    with pytest.raises(UnsupportedFeature, match=r"size 5 does not divide num_heads = 24; sizes that fit are 1, 2, 3"):
        check_group(5, (InProj(1).cut,))


@pytest.mark.parametrize(("groups", "size"), SHARED)
def test_what_is_taken_apart_comes_together(groups: int, size: int) -> None:
    proj = InProj(groups)
    whole, gathered = torch.randn(proj.outputs, 4), torch.full((proj.outputs, 4), torch.nan)
    for rank in range(size):
        runs = proj.part(rank, size).rows
        held = take(whole, runs)
        assert torch.equal(held, whole[places(runs)])
        assert (held.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()) is (len(runs) == 1)
        put_(gathered, runs, held)
    assert torch.equal(gathered, whole)


@dataclass(frozen=True)
class Layer:
    """One rank's share of the projection, with an adapter's share in slot 0."""

    proj: InProj
    weight: torch.Tensor
    bias: torch.Tensor

    def run(self, x: torch.Tensor, delta: SiteDelta, rank: int, size: int) -> torch.Tensor:
        site, part = self.proj.site, self.proj.part(rank, size)
        lora, width = ReferenceLora(), length(part.rows)
        table = lora.new_table(INPUTS, (width,), dtype=torch.float32, device=torch.device("cpu"), max_bytes=1 << 20)
        rows_site = RowsSite(RowsForm.MULTIPLIED, width, INPUTS, torch.float32, bias=True)
        rows = RowsTable(rows_site, RowsMemory(lora.slots, torch.device("cpu")))
        SlotMark(lora.slots).write(0, NoBytes())  # a rank may have nothing of what others have
        mine = cut({site.name: delta}, {site.name: site}, rank, size).get(site.name)
        if mine is not None:
            if (factors := mine.factors()) is not None:
                part_delta = PartDelta(Factors(*factors), mine.out_scale, mine.shift)
                table.write(0, table.pack(SlotDelta((part_delta,), mine.in_scale)))
            if mine.rows is not None:
                rows.write(0, rows.pack(mine.rows))
        weight = dense_weight(take(self.weight, part.rows).contiguous())
        parts = LinearParts(weight, take(self.bias, part.rows), table, (rows,))
        layer = Linear((site.name,), parts, Shard.COLUMN, LonelyRank(rank, size))
        return layer(x, lora.prepare(plan_rows([(2, (Term(0),)), (1, ())])))


def deltas(outputs: int) -> dict[str, SiteDelta]:
    """By what they change."""
    low_rank = LowRank(torch.randn(4, INPUTS), torch.randn(outputs, 4), 0.5)
    chosen = torch.randperm(outputs)[: outputs // 3].sort().values
    some = Rows(torch.randn(len(chosen), INPUTS), chosen, torch.randn(len(chosen)))
    last = Rows(torch.randn(1, INPUTS), torch.tensor([outputs - 1]), torch.randn(1))
    every = Rows(torch.randn(outputs, INPUTS), None, torch.randn(outputs))
    scales = torch.rand(outputs) + 0.5, torch.rand(INPUTS) + 0.5, torch.randn(outputs)
    return {
        "everything that is multiplied": SiteDelta(low_rank, *scales),
        "own rows": SiteDelta(low_rank, rows=some, exclusive="a test"),
        "one row": SiteDelta(rows=last, exclusive="a test"),
        "an own weight": SiteDelta(low_rank, *scales, every, "a test"),
    }


@pytest.mark.parametrize("what", ["everything that is multiplied", "own rows", "one row", "an own weight"])
@pytest.mark.parametrize(("groups", "size"), SHARED)
def test_ranks_have_the_outputs_of_the_whole(groups: int, size: int, what: str) -> None:
    torch.manual_seed(groups * 10 + size)
    proj = InProj(groups)
    layer = Layer(proj, torch.randn(proj.outputs, INPUTS), torch.randn(proj.outputs))
    delta, x = deltas(proj.outputs)[what], torch.randn(3, INPUTS)
    whole = layer.run(x, delta, 0, 1)
    weight, bias = delta.merged(layer.weight, layer.bias)
    torch.testing.assert_close(whole[:2], x[:2] @ weight.T + bias)
    for rank in range(size):
        mine = whole[:, places(proj.part(rank, size).rows)]
        torch.testing.assert_close(layer.run(x, delta, rank, size), mine)
