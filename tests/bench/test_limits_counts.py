"""Bytes and launches, checked against cells counted by hand and against what must hold in every cell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.limits.batch import AdapterRows, Batch, even_batch
from bench.limits.designs import (
    DESIGNS,
    FEW_ROWS,
    FUSED,
    LEAST,
    MANY_ROWS,
    TWO_LAUNCHES,
    USUAL,
    USUAL_PADDED,
    Design,
    Segmented,
    Traffic,
)
from bench.limits.grid import Cell, cells
from bench.limits.hardware import BF16, FOUR_BIT, H200, BaseFormat, Hardware
from bench.limits.layouts import rank_class, wastes
from bench.limits.shapes import LLAMA_8B, ModelShape, PackedLayer, read_config
from bench.limits.steps import StepCost, bytes_s, overhead, retention, step_cost
from loraplex_kernels.lora.device_layout import DECODE_ROWS, FORMS, Form

QKV = PackedLayer("qkv", 4096, (4096, 1024, 1024))
CELLS = tuple(cells())


def cost(design: Design, batch: Batch, hardware: Hardware = H200) -> StepCost:
    return step_cost(design, LLAMA_8B, batch, hardware)


def test_an_8b_adapter_weighs_5_24_megabytes_a_rank() -> None:
    # in + out of q, k, v, o, gate, up, down: 8192 + 5120 + 5120 + 8192 + 18432 * 3 = 81920 elements a layer and rank
    assert LLAMA_8B.adapter_bytes(1) == 32 * 81920 * 2 == 5_242_880
    assert LLAMA_8B.num_tables == 128


def test_a_base_step_reads_every_weight_once() -> None:
    layer = 4096 * 6144 + 4096 * 4096 + 4096 * 28672 + 14336 * 4096
    assert BF16.step_bytes(LLAMA_8B) == 2 * (32 * layer + 4096 * 128256)
    assert BF16.step_s(LLAMA_8B, H200) == pytest.approx(3.49e-3, rel=1e-3)
    assert FOUR_BIT.step_s(LLAMA_8B, H200) == pytest.approx(1.11e-3, rel=4e-3)


@pytest.mark.parametrize(("base", "percent"), [(BF16, 0.035), (FOUR_BIT, 0.11)], ids=["bf16", "4.25-bit"])
@pytest.mark.parametrize(("distinct", "rank"), [(1, 16), (8, 8), (32, 64)])
def test_the_least_overhead_is_distinct_times_rank(base: BaseFormat, percent: float, distinct: int, rank: int) -> None:
    least = overhead(cost(LEAST, even_batch(32, [rank] * distinct)), base, LLAMA_8B, H200)
    assert 100 * least == pytest.approx(distinct * rank * percent, rel=0.01)


def test_two_launches_of_one_row_by_hand() -> None:
    shrink, expand = TWO_LAUNCHES.launches(QKV, even_batch(1, [16]))
    # A of three parts and an address; then x for each 16 of 48 stacked ranks, and 8 planes of their sums in float32
    assert shrink == Traffic(3 * 16 * 4096 * 2 + 8, 3 * 4096 * 2 + 8 * 48 * 4)
    # B and an address; then all planes for each of 48 tiles of 128 columns, and y read and written
    assert expand == Traffic(16 * 6144 * 2 + 8, 48 * 8 * 16 * 4 + 6144 * 2 * 2)


def test_stacked_parts_share_rank_tiles() -> None:
    # 3 x 8 ranks are two tiles of 16, not three
    (shrink, _) = TWO_LAUNCHES.launches(QKV, even_batch(1, [8]))
    assert shrink.l2_bytes == 2 * 4096 * 2 + 8 * 24 * 4


@pytest.mark.parametrize(("form", "tiles"), [(FORMS.decode, FEW_ROWS), (FORMS.wide, MANY_ROWS)], ids=["few", "many"])
def test_our_design_is_the_one_that_was_built(form: Form, tiles: Segmented) -> None:
    assert (form.block_m, form.block_r, form.block_n) == (tiles.row_block, tiles.rank_block, tiles.column_block)
    assert (form.split_k, form.max_splits, form.block_k) == (tiles.split_columns, tiles.max_splits, tiles.split_unit)
    for layer in LLAMA_8B.packed_layers:
        assert form.splits(layer.in_features) == tiles.splits(layer.in_features)
    assert DECODE_ROWS == TWO_LAUNCHES.few_rows == FUSED.few_rows


def test_one_launch_moves_what_two_move() -> None:
    batch = even_batch(32, [8, 16, 32, 64])
    shrink, expand = TWO_LAUNCHES.launches(QKV, batch)
    assert FUSED.launches(QKV, batch) == (shrink + expand,)


def test_a_second_row_tile_reads_factors_from_the_cache() -> None:
    sixteen, seventeen = (TWO_LAUNCHES.launches(QKV, even_batch(rows, [16])) for rows in (16, 17))
    for layer_bytes, few, many in zip((QKV.a_bytes(16), QKV.b_bytes(16)), sixteen, seventeen, strict=True):
        assert many.dram_bytes == few.dram_bytes
        row = few.l2_bytes // 16
        assert many.l2_bytes == few.l2_bytes + row + layer_bytes


def test_planes_summed_once_are_read_once() -> None:
    shrink, expand = replace(FEW_ROWS, summed_once=True).launches(QKV, even_batch(1, [16]))
    assert shrink.l2_bytes == 3 * 4096 * 2 + (2 * 8 + 1) * 48 * 4
    assert expand.l2_bytes == 48 * 16 * 4 + 6144 * 2 * 2


def test_the_usual_design_by_hand() -> None:
    zero, shrink, expand = USUAL.launches(QKV, even_batch(1, [16]))
    assert zero == Traffic(0, 3 * 16 * 4)
    # x for each slice; sums added atomically by 16 splits, each a read and a write
    assert shrink == Traffic(3 * 16 * 4096 * 2, 3 * 4096 * 2 + 2 * 16 * 3 * 16 * 4)
    assert expand == Traffic(16 * 6144 * 2, 48 * 16 * 4 + 6144 * 2 * 2)


def test_launches_of_a_step() -> None:
    batch = even_batch(8, [16] * 4)
    launches = {design.name: cost(design, batch).launches for design in DESIGNS}
    # 128 tables, and one upload of metadata
    assert launches == {
        LEAST.name: 0,
        FUSED.name: 129,
        TWO_LAUNCHES.name: 257,
        USUAL.name: 385,
        USUAL_PADDED.name: 385,
    }


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
def test_base_rows_alone_cost_nothing(design: Design) -> None:
    nothing = cost(design, Batch((), base_rows=32))
    assert (nothing.launches, nothing.dram_bytes, nothing.l2_bytes, nothing.total_s) == (0, 0, 0, 0)
    assert retention(nothing, BF16, LLAMA_8B, H200) == 1


@pytest.mark.parametrize("design", [LEAST, FUSED, TWO_LAUNCHES], ids=lambda design: design.name)
def test_base_rows_beside_adapters_are_free_in_ours(design: Design) -> None:
    batch = even_batch(8, [16] * 4)
    assert cost(design, replace(batch, base_rows=24)) == cost(design, batch)


def test_padding_costs_nothing_when_all_ranks_are_the_largest() -> None:
    for rows, distinct in ((1, 1), (32, 8), (128, 32)):
        batch = even_batch(rows, [64] * distinct)
        assert cost(USUAL_PADDED, batch) == replace(cost(USUAL, batch), design=USUAL_PADDED.name)
        assert cost(USUAL, batch).dram_bytes == cost(LEAST, batch).dram_bytes


def test_padding_reads_the_largest_rank_for_every_adapter() -> None:
    mixed = even_batch(8, [8, 16, 32, 64])
    assert cost(USUAL, mixed).dram_bytes == 4 * LLAMA_8B.adapter_bytes(64)
    assert cost(LEAST, mixed).dram_bytes == LLAMA_8B.adapter_bytes(8 + 16 + 32 + 64)


def test_an_adapter_above_the_servers_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="max_lora_rank 64 is below the batch's largest rank 128"):
        cost(USUAL_PADDED, even_batch(1, [128]))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_no_design_is_below_the_least(cell: Cell) -> None:
    costs = {design.name: cost(design, cell.batch()) for design in DESIGNS}
    least = costs[LEAST.name]
    for found in costs.values():
        assert found.dram_bytes >= least.dram_bytes
        assert found.bytes_s >= least.bytes_s
    assert costs[FUSED.name].total_s < costs[TWO_LAUNCHES.name].total_s
    assert costs[USUAL.name].total_s <= costs[USUAL_PADDED.name].total_s


@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
def test_more_adapters_ranks_or_rows_never_cost_less(design: Design) -> None:
    def total_s(rows: int, ranks: list[int]) -> float:
        return cost(design, even_batch(rows, ranks)).total_s

    assert total_s(32, [8] * 4) <= total_s(32, [16] * 4) <= total_s(32, [64] * 4)
    assert total_s(32, [16] * 4) <= total_s(64, [16] * 4)
    assert total_s(64, [16] * 4) < total_s(64, [16] * 32)


def test_a_launch_takes_its_slower_stream() -> None:
    hardware = Hardware("square", dram_bytes_per_s=2.0, l2_bytes_per_s=4.0, node_s=1.0)
    assert bytes_s(Traffic(8, 0), hardware) == 4
    assert bytes_s(Traffic(8, 16), hardware) == 6
    # 128 nodes of a second, the metadata's copy, and their bytes
    one = step_cost(FUSED, LLAMA_8B, Batch((AdapterRows(8, 1),)), hardware)
    assert one.launch_s == 129
    assert one.total_s == one.launch_s + one.bytes_s


def test_rows_are_spread_evenly() -> None:
    assert [adapter.rows for adapter in even_batch(10, [8] * 4).adapters] == [3, 3, 2, 2]
    with pytest.raises(ValueError, match="5 distinct adapters in 4 rows"):
        even_batch(4, [8] * 5)


def test_layouts_waste_what_they_round_up() -> None:
    found = {(waste.mix, waste.layout): waste for waste in wastes()}
    mix = "4, 12, 24, 48"
    assert found[mix, "true rank, table of addresses"].wasted == 0
    # 8 + 16 + 32 + 64 of 88, a launch each; 16 + 16 + 32 + 48; 4 * 48
    assert found[mix, "rank classes 8/16/32/64/128"].wasted == pytest.approx(120 / 88 - 1)
    assert found[mix, "rank classes 8/16/32/64/128"].launches_per_op == 4
    assert found[mix, "pages of 16 ranks"].wasted == pytest.approx(112 / 88 - 1)
    assert found[mix, "padded to the largest"].wasted == pytest.approx(192 / 88 - 1)
    with pytest.raises(ValueError, match="rank 256 is above the largest class, 128"):
        rank_class(256)


def test_a_shape_is_read_from_a_config(tmp_path: Path) -> None:
    path = tmp_path / "tiny" / "config.json"
    path.parent.mkdir()
    path.write_text(
        '{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,'
        ' "num_key_value_heads": 2, "vocab_size": 100}'
    )
    assert read_config(path) == ModelShape("tiny", 64, 96, 2, 4, 2, 16, 100)
    path.write_text('{"hidden_size": "64"}')
    with pytest.raises(ValueError, match="num_attention_heads is None, must be a positive integer"):
        read_config(path)
