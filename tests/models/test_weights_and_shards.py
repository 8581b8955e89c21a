"""Dense weights keep their bits; slices over ranks cover every row once; two half models sum to the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig

from loraplex.config import ModelConfig
from loraplex.errors import UnsupportedFeature
from loraplex.layers.linear import Linear, LinearParts
from loraplex.models.loader import plan_model
from loraplex.models.safetensors_source import SafetensorsReader
from loraplex.models.sites import SiteKind
from loraplex.parallel.group import solo
from loraplex.parallel.shard import Cut, Part, Shard, check_group, length
from loraplex.quant.base import WHOLE, Placement
from loraplex.quant.dense import dense_weight, packs
from loraplex_kernels.lora import Factors, PartDelta, SlotDelta
from loraplex_kernels.lora.reference import ReferenceLora
from loraplex_kernels.segments import SegmentPlan, Term, plan_rows
from tests.fakes_rows import linear_rows
from tests.lonely_rank import LonelyRank, load_part
from tests.tiny import tiny_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 5), (64, 32), (96, 33), (1, 1)])
def test_dense_weight_multiplies_and_gives_back_its_bits(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    weight = dense_weight(matrix.clone())
    assert weight.shape == shape
    assert weight.nbytes >= matrix.nbytes
    assert torch.equal(weight.dequantize(), matrix)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    for rows in (0, 1, 3, 33):
        x = torch.randn(rows, shape[1]).to(dtype)
        for b in (None, bias):
            y = weight.matmul(x, b)
            assert y.is_contiguous()
            assert y.dtype is dtype
            expected = F.linear(x.double(), matrix.double(), None if b is None else b.double())
            torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_packing_follows_its_rule() -> None:
    assert not packs(Placement(torch.device("cuda"), torch.bfloat16))
    assert not packs(Placement(CPU, torch.float16))


def side(part: Part, name: str) -> slice:
    """Its ``rows``, which are one run, or its ``cols``."""
    (rows,) = part.rows
    return rows if name == "rows" else part.cols


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("shard", [Shard.COLUMN, Shard.ROW])
def test_parts_cover_everything_once(shard: Shard, size: int) -> None:
    parts = [Cut(shard, 8, "heads").part(64, 64, rank, size) for rank in range(size)]
    cut, whole = ("rows", "cols") if shard is Shard.COLUMN else ("cols", "rows")
    assert [row for part in parts for row in range(64)[side(part, cut)]] == list(range(64))
    assert {(side(part, whole).start, side(part, whole).stop) for part in parts} == {(0, 64)}
    assert [part.leads for part in parts] == [True, *[False] * (size - 1)]


def test_groups_that_do_not_fit_are_refused_by_name() -> None:
    cuts = (Cut(Shard.COLUMN, 12, "num_attention_heads"), Cut(Shard.COLUMN, 4, "num_key_value_heads", shared=True))
    check_group(12, cuts)
    with pytest.raises(UnsupportedFeature) as caught:
        check_group(8, cuts)
    assert str(caught.value) == (
        "tensor_parallel_size 8 does not divide num_attention_heads = 12; sizes that fit are 1, 2, 4, 12"
    )
    assert caught.value.field == "tensor_parallel_size"
    with pytest.raises(UnsupportedFeature, match="does not divide num_key_value_heads = 4; sizes"):
        check_group(6, cuts)


def test_key_value_heads_are_replicated_when_ranks_outnumber_them() -> None:
    shared = Cut(Shard.COLUMN, 2, "num_key_value_heads", shared=True)
    assert [shared.part(16, 4, rank, 8).rows[0].start for rank in range(8)] == [0, 0, 0, 0, 8, 8, 8, 8]
    assert {length(shared.part(16, 4, rank, 8).rows) for rank in range(8)} == {8}


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_sites_are_cut_as_transformers_cuts_them(tmp_path_factory: pytest.TempPathFactory, arch: str) -> None:
    """Its plan names linear modules of a layer; both ends of the vocabulary and the norms are not in every version."""
    checkpoint = tiny_checkpoint(tmp_path_factory.getbasetemp(), arch)
    plan = AutoConfig.from_pretrained(checkpoint).base_model_tp_plan
    assert plan, "transformers has a plan for each of these"
    shards = {"colwise": Shard.COLUMN, "rowwise": Shard.ROW}
    theirs = {name.rsplit(".", 1)[-1]: shards[style] for name, style in plan.items() if style in shards}
    sites = plan_model(checkpoint, ModelConfig(device="cpu")).spec.sites()
    ours = {site.module: site.cut.shard for site in sites}
    assert len(theirs) >= 7
    assert {module: ours[module] for module in theirs} == theirs


def test_adapter_terms_come_before_the_row_parallel_sum() -> None:
    """Each rank's half of x and A gives half of the product; the halves add up to the whole layer with its adapter."""
    torch.manual_seed(1)
    matrix, bias = torch.randn(6, 8), torch.randn(6)
    factors, x = Factors(torch.randn(2, 8), torch.randn(6, 2)), torch.randn(3, 8)
    lora = ReferenceLora()

    def layer(rank: int, size: int) -> torch.Tensor:
        group = LonelyRank(rank, size)
        cols = Cut(Shard.ROW, 8, "in_features").part(6, 8, rank, size).cols
        table = lora.new_table(length(cols), (6,), dtype=torch.float32, device=CPU, max_bytes=1 << 20)
        table.write(0, table.pack(SlotDelta((PartDelta(Factors(factors.a[:, cols], factors.b)),))))
        parts = LinearParts(
            dense_weight(matrix[:, cols].contiguous()), bias if rank == 0 else None, table, (linear_rows(6, 4),)
        )
        return Linear(("m.o_proj",), parts, Shard.ROW, group)(
            x[:, cols].contiguous(), lora.prepare(plan_rows([(2, (Term(0),)), (1, ())]))
        )

    whole = x @ matrix.T + bias
    whole[:2] += x[:2] @ factors.a.T @ factors.b.T
    torch.testing.assert_close(layer(0, 1), whole)
    torch.testing.assert_close(layer(0, 2) + layer(1, 2), whole)


def test_base_only_steps_never_touch_a_table() -> None:
    class Untouchable:
        in_features = 4
        part_sizes = (4,)

    parts = LinearParts(dense_weight(torch.eye(4)), None, Untouchable(), (linear_rows(4, 4),))  # type: ignore[arg-type]
    layer = Linear(("m.q_proj",), parts, Shard.COLUMN, solo())
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x, ReferenceLora().prepare(SegmentPlan(2, ()))), x)


def test_ranks_hold_their_share(tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint: Path = tiny_checkpoint(tmp_path_factory.getbasetemp(), "qwen2")
    for rank in range(4):
        model = load_part(plan_model(checkpoint, ModelConfig(device="cpu")), rank, 4)
        assert model.kv_spec().kv_heads == 1
        tables = model.tables()
        q, o = tables["model.layers.0.self_attn.q_proj"], tables["model.layers.0.self_attn.o_proj"]
        assert q.table.part_sizes == (8, 8, 8)
        assert (o.table.in_features, o.table.part_sizes) == (8, (32,))
        assert tables["lm_head"].table.part_sizes == (24,)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_read_their_slices_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A checkpoint is mapped: what is not asked for is not read."""
    checkpoint = tiny_checkpoint(tmp_path_factory.getbasetemp(), "llama", tie_word_embeddings=False)
    plan = plan_model(checkpoint, ModelConfig(device="cpu"))
    read: dict[str, int] = {}
    tensor_of = SafetensorsReader.tensor

    def counted(reader: SafetensorsReader, key: str, rows: slice = WHOLE, cols: slice = WHOLE) -> torch.Tensor:
        found = tensor_of(reader, key, rows, cols)
        assert key not in read, "read twice"
        read[key] = found.numel()
        return found

    monkeypatch.setattr(SafetensorsReader, "tensor", counted)
    for rank in range(size):
        read.clear()
        load_part(plan, rank, size)
        for site in plan.spec.sites():
            part = site.part(rank, size)
            elements = length(part.rows) * (1 if site.kind is SiteKind.NORM else length(part.cols))
            assert read[f"{site.name}.weight"] == elements, site.name
