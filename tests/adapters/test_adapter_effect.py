"""An adapter that changes nothing is refused, whatever its kind and however it says nothing, unless it says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.adapters.effect import check_effect
from loraplex.adapters.load import load_adapter
from loraplex.adapters.reading.source import any_directory
from loraplex.errors import InvalidAdapter
from loraplex.layers.rows import Rows
from tests.adapters.peft_saved import SavedCase, lora, make
from tests.adapters.test_saved import tokens
from tests.fakes_adapters import tiny_llama, view_of
from tests.tiny import oracle, tiny_checkpoint

LIMIT = 1 << 24
Q = "model.layers.0.self_attn.q_proj"
NORM = "model.norm"
E = "model.embed_tokens"


@pytest.fixture(scope="module")
def base() -> BaseView:
    torch.set_num_threads(1)
    return view_of(tiny_llama())


def nothing(base: BaseView) -> dict[str, dict[str, SiteDelta]]:
    a, b, zeros = torch.ones(2, 32), torch.ones(32, 2), torch.zeros(32)
    weight = base.weight(E)
    return {
        "B is zero": {Q: SiteDelta(LowRank(a, 0 * b, 1.0))},
        "A is zero": {Q: SiteDelta(LowRank(0 * a, b, 1.0))},
        "scales of one": {Q: SiteDelta(out_scale=torch.ones(32), in_scale=torch.ones(32))},
        "a scale of one, rounded": {Q: SiteDelta(out_scale=torch.ones(32) + 1e-7)},
        "no shift": {Q: SiteDelta(shift=zeros)},
        "the base's norm": {NORM: SiteDelta(rows=Rows(base.weight(NORM)))},
        "the base's norm, rounded": {NORM: SiteDelta(rows=Rows(base.weight(NORM).bfloat16()))},
        "the base's rows": {E: SiteDelta(rows=Rows(weight[[3, 9]], torch.tensor([3, 9])))},
        "all at once": {
            Q: SiteDelta(LowRank(a, 0 * b, 1.0), out_scale=torch.ones(32), shift=zeros),
            E: SiteDelta(rows=Rows(weight)),
        },
        "no site": {},
    }


def something(base: BaseView) -> dict[str, SiteDelta]:
    one = torch.zeros(32)
    one[5] = 1e-3
    return {
        "a factor": SiteDelta(LowRank(torch.ones(2, 32), torch.ones(32, 2) * 1e-6, 1.0)),
        "an output's scale": SiteDelta(out_scale=1 + one),
        "an input's scale": SiteDelta(in_scale=1 + one),
        "a shift": SiteDelta(shift=one),
        "a weight": SiteDelta(rows=Rows(base.weight(Q) + one)),
        "a row": SiteDelta(rows=Rows(base.weight(Q)[[3, 9]] + one, torch.tensor([3, 9]))),
        "an added row": SiteDelta(rows=Rows(base.weight(Q)[[3]], torch.tensor([32]))),
    }


def test_nothing_is_refused(base: BaseView) -> None:
    for name, sites in nothing(base).items():
        with pytest.raises(InvalidAdapter, match="m: the adapter changes nothing") as caught:
            check_effect(sites, base, "m")
        assert "loraplex.identity" in str(caught.value), name


def test_anything_is_accepted(base: BaseView) -> None:
    for delta in something(base).values():
        for sites in nothing(base).values():
            check_effect({**sites, Q: delta}, base, "m")


def test_the_base_is_not_asked_for_where_factors_say_enough(base: BaseView) -> None:
    def never(site: str) -> torch.Tensor:
        raise AssertionError(f"read {site}")

    view = BaseView(base.sites, base.dtype, never, never, base.tied, base.vocab_size)
    rows = SiteDelta(rows=Rows(base.weight(NORM)))
    check_effect({NORM: rows, Q: something(base)["a factor"]}, view, "m")


@pytest.mark.parametrize(
    "case",
    [
        SavedCase(lora(init_lora_weights=True)),
        SavedCase(lora(init_lora_weights=True, trainable_token_indices=[3])),
        SavedCase(lora(init_lora_weights=True, modules_to_save=["norm", "lm_head"])),
        SavedCase(lora(init_lora_weights=True, use_dora=True)),
        SavedCase(lambda: tokens(token_indices=[3])),
    ],
    ids=["lora", "tokens beside", "saved beside", "dora", "tokens"],
)
def test_an_untrained_adapter(tmp_path: Path, case: SavedCase) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "llama")
    make(case, checkpoint, tmp_path / "a", strength=0.0)
    view = view_of(oracle(checkpoint))
    with pytest.raises(InvalidAdapter, match="the adapter changes nothing"):
        load_adapter(any_directory(str(tmp_path / "a")), view, max_bytes=LIMIT)
    file = tmp_path / "a/adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "loraplex.identity": "yes"})
    with pytest.raises(InvalidAdapter, match="the adapter changes nothing"):
        load_adapter(any_directory(str(tmp_path / "a")), view, max_bytes=LIMIT)
    save_file(load_file(file), file, {"format": "pt", "loraplex.identity": "true"})
    assert load_adapter(any_directory(str(tmp_path / "a")), view, max_bytes=LIMIT).identity


def test_metadata_is_part_of_the_content(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "llama")
    make(SavedCase(lora()), checkpoint, tmp_path / "a")
    view = view_of(oracle(checkpoint))
    first = load_adapter(any_directory(str(tmp_path / "a")), view, max_bytes=LIMIT)
    assert not first.identity
    file = tmp_path / "a/adapter_model.safetensors"
    save_file(load_file(file), file, {"loraplex.identity": "true"})
    second = load_adapter(any_directory(str(tmp_path / "a")), view, max_bytes=LIMIT)
    assert second.identity
    assert second.uid != first.uid
