"""Sites with an adapter folded in, piece by piece, against the algebra's own formula; and the files they are put in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors import safe_open

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.adapters.exporting import merged_site as module
from loraplex.adapters.exporting.lora_format import as_lora
from loraplex.adapters.exporting.merged_model import plan_merged
from loraplex.adapters.exporting.merged_site import merged_site
from loraplex.adapters.exporting.shards import TensorPlan, header_of, in_shards, index_of, write_tensor
from loraplex.errors import InvalidAdapter, UnsupportedFeature
from loraplex.layers.rows import Rows
from loraplex.models.sites import Site, SiteKind
from tests.adapters.peft_merges import of

OUT, IN, RANK = 13, 6, 3
LINEAR = Site("model.layers.0.mlp.up_proj", SiteKind.LINEAR, IN, OUT, bias=True)
EMBEDDING = Site("model.embed_tokens", SiteKind.EMBEDDING, OUT, IN)


def low_rank(rows: int, cols: int) -> LowRank:
    return LowRank(torch.randn(RANK, cols), torch.randn(rows, RANK), 0.7)


def own(indices: list[int] | None, bias: bool = True) -> Rows:
    count = OUT if indices is None else len(indices)
    places = None if indices is None else torch.tensor(indices)
    return Rows(torch.randn(count, IN), places, torch.randn(count) if bias else None)


def nobody(name: str) -> NoReturn:
    """What asks for the base's weights, where they are not to be asked for."""
    raise AssertionError(name)


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows at a time, so that the last piece is a short one."""
    torch.manual_seed(3)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 4 * IN)


@pytest.mark.parametrize("rows", [None, [0, 5, 12], [4], [3, 13, 15], "all"])
@pytest.mark.parametrize("parts", ["", "low rank", "scales", "low rank, scales, shift"])
def test_a_linear_site_is_the_formula_in_pieces(rows: list[int] | str | None, parts: str) -> None:
    delta = SiteDelta(
        low_rank=low_rank(OUT, IN) if "low rank" in parts else None,
        out_scale=torch.rand(OUT) if "scales" in parts else None,
        in_scale=torch.rand(IN) if "scales" in parts else None,
        shift=torch.randn(OUT) if "shift" in parts else None,
        rows=None if rows is None else own(None if rows == "all" else rows),  # type: ignore[arg-type]
    )
    weight, bias = torch.randn(OUT, IN), torch.randn(OUT)
    expected, expected_bias = delta.merged(weight, bias)
    found, found_bias = merged_site(LINEAR, delta, weight, bias, torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found_bias, expected_bias, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("site", [LINEAR, EMBEDDING], ids=["linear", "embedding"])
def test_what_a_quantized_base_has_in_float32_is_rounded_once(site: Site) -> None:
    delta = SiteDelta(low_rank=low_rank(*((OUT, IN) if site is LINEAR else (IN, OUT))))
    weight = torch.randn(OUT, IN)
    whole, _ = merged_site(site, delta, weight, None, torch.float32)
    found, _ = merged_site(site, delta, weight, None, torch.bfloat16)
    assert torch.equal(found, whole.bfloat16())
    assert not torch.equal(found, merged_site(site, delta, weight.bfloat16(), None, torch.bfloat16)[0])


def test_a_shift_is_the_bias_of_a_site_without_one() -> None:
    shift = torch.randn(OUT)
    weight, bias = merged_site(LINEAR, SiteDelta(shift=shift), torch.zeros(OUT, IN), None, torch.float32)
    assert torch.equal(weight, torch.zeros(OUT, IN))
    assert bias is not None
    assert torch.equal(bias, shift)


@pytest.mark.parametrize("rows", [None, [0, 5, 12], [3, 13, 15]])
def test_an_embedding_is_looked_up_as_it_is_served(rows: list[int] | None) -> None:
    delta = SiteDelta(
        low_rank=low_rank(IN, OUT), out_scale=torch.rand(IN), rows=None if rows is None else own(rows, bias=False)
    )
    weight = torch.randn(OUT, IN)
    found, bias = merged_site(EMBEDDING, delta, weight, None, torch.float32)
    assert bias is None
    assert delta.low_rank is not None
    assert delta.out_scale is not None
    assert len(found) == (16 if rows == [3, 13, 15] else OUT)
    for token in range(len(found)):
        if rows is not None and token in rows:
            assert delta.rows is not None
            expected = delta.rows.values[rows.index(token)]
        else:
            expected = weight[token] if token < OUT else torch.zeros(IN)
        if token < OUT:  # what is done to added tokens is in their rows
            column = delta.low_rank.a[:, token]
            expected = delta.out_scale * (expected + delta.low_rank.scale * (delta.low_rank.b @ column))
        torch.testing.assert_close(found[token], expected, rtol=1e-5, atol=1e-6)


def test_other_sites_take_their_own_rows() -> None:
    norm, values = Site("model.norm", SiteKind.NORM, IN, IN), torch.randn(IN)
    assert torch.equal(merged_site(norm, SiteDelta(rows=Rows(values)), torch.ones(IN), None, torch.float32)[0], values)
    conv = Site("model.layers.0.mixer.conv1d", SiteKind.CONV, 4, OUT, bias=True)
    rows = Rows(torch.randn(OUT, 4), None, torch.randn(OUT))
    weight, bias = merged_site(conv, SiteDelta(rows=rows), torch.zeros(OUT, 1, 4), torch.zeros(OUT), torch.float32)
    assert torch.equal(weight, rows.values.unsqueeze(1))
    assert bias is rows.bias


@pytest.mark.parametrize(
    ("head", "tied"),
    [
        (None, False),
        (own([4], bias=False), False),
        (Rows(torch.zeros(1, IN), torch.tensor([4])), False),
        (Rows(torch.ones(1, IN), torch.tensor([3])), False),
        (Rows(torch.ones(1, IN), torch.tensor([4])), True),
    ],
    ids=["the embedding alone", "other values", "zeros", "another token", "the same"],
)
def test_ends_stay_tied_where_both_have_the_same_rows(head: Rows | None, tied: bool) -> None:
    ends = {"model.embed_tokens": EMBEDDING, "lm_head": Site("lm_head", SiteKind.LINEAR, IN, OUT)}
    base = BaseView(tuple(ends.values()), torch.float32, weight=nobody, bias=nobody, tied=True, vocab_size=OUT)
    sites = {"model.embed_tokens": SiteDelta(rows=Rows(torch.ones(1, IN), torch.tensor([4])))}
    if head is not None:
        sites["lm_head"] = SiteDelta(rows=head)
    model = plan_merged(of(sites), base, {"tie_word_embeddings": True}, lambda config: base.sites)
    assert model.config["tie_word_embeddings"] is tied
    assert [plan.key for plan in model.plans()] == [f"{name}.weight" for name in list(ends)[: 2 - tied]]


def test_own_rows_beside_factors_are_no_lora() -> None:
    both = SiteDelta(low_rank=low_rank(OUT, IN), rows=own([4]))
    other = replace(LINEAR, name="model.layers.0.mlp.gate_proj")
    base = BaseView((LINEAR, other), torch.float32, weight=nobody, bias=nobody, tied=False, vocab_size=OUT)
    delta = of({LINEAR.name: both, other.name: SiteDelta(low_rank=low_rank(OUT, IN))})
    with pytest.raises(
        UnsupportedFeature, match=r"own rows at 'model\.layers\.0\.mlp\.up_proj' and low rank, own rows"
    ):
        as_lora(delta, base)


@pytest.mark.parametrize("low", [None, low_rank(OUT, IN)], ids=["alone", "beside factors"])
@pytest.mark.parametrize("side", ["in_scale", "out_scale"])
def test_scales_of_what_the_base_gives_are_no_lora(side: str, low: LowRank | None) -> None:
    scaled = replace(SiteDelta(low_rank=low), **{side: torch.full((IN if side == "in_scale" else OUT,), 2.0)})
    base = BaseView((LINEAR,), torch.float32, weight=nobody, bias=nobody, tied=False, vocab_size=OUT)
    with pytest.raises(UnsupportedFeature, match=r"scales what the base gives at 'model\.layers\.0\.mlp\.up_proj'"):
        as_lora(of({LINEAR.name: scaled}), base)


def test_values_out_of_range_are_refused_by_site() -> None:
    weight = torch.full((OUT, IN), 6e4, dtype=torch.float16)
    delta = SiteDelta(out_scale=torch.full((OUT,), 2.0))
    with pytest.raises(InvalidAdapter, match=r"'model\.layers\.0\.mlp\.up_proj' with the adapter folded in.*float16"):
        merged_site(LINEAR, delta, weight, None, torch.float16)


def test_a_large_tensor_is_written_in_pieces(tmp_path: Path) -> None:
    pieces: list[int] = []
    tensor = torch.randn(3, 1 << 20).half()  # 6 MiB
    with (tmp_path / "t").open("wb", buffering=0) as file:
        write_tensor(file, tensor, TensorPlan("t", (3, 1 << 20), torch.float16), lambda: pieces.append(file.tell()))
    assert pieces == [4 << 20]
    assert torch.equal(torch.from_file(str(tmp_path / "t"), size=3 << 20, dtype=torch.float16), tensor.view(-1))


def test_shards_are_as_large_as_allowed_and_read_back(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 1, 4).half(),
        "d": torch.randn(40),  # larger than a shard
        "e": torch.randn(0, 4),
        "f": torch.randn(4),
    }
    plans = tuple(TensorPlan(key, tuple(value.shape), value.dtype) for key, value in tensors.items())
    shards = in_shards(plans, 90)
    assert [[plan.key for plan in shard.tensors] for shard in shards] == [["a", "b", "c"], ["d"], ["e", "f"]]
    assert [shard.file for shard in shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert json.loads(index_of(shards)) == {
        "metadata": {"total_size": sum(value.nbytes for value in tensors.values())},
        "weight_map": {key: shards["abcdef".index(key) // 3 + (key in "ef")].file for key in tensors},
    }
    for shard in shards:
        with (tmp_path / shard.file).open("wb") as file:
            file.write(header_of(shard.tensors, {"format": "pt"}))
            for plan in shard.tensors:
                write_tensor(file, tensors[plan.key], plan, lambda: None)
        with safe_open(tmp_path / shard.file, framework="pt") as read:
            assert read.metadata() == {"format": "pt"}
            for plan in shard.tensors:
                assert torch.equal(read.get_tensor(plan.key), tensors[plan.key])
    assert [shard.file for shard in in_shards(plans, 1 << 20)] == ["model.safetensors"]
