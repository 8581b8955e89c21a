"""What is kept of a saved module: the rows that differ from the base's, in its dtype, and why they stand alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.errors import InvalidAdapter
from tests.adapters.peft_saved import SavedCase, load, lora, make, merged
from tests.fakes_adapters import sites_of
from tests.tiny import VOCAB_SIZE as V
from tests.tiny import oracle, tiny_checkpoint

E, H = "model.embed_tokens", "lm_head"
WIDE = V + 3


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("rows")
    return {tied: tiny_checkpoint(root, "qwen2", tie_word_embeddings=tied) for tied in (False, True)}


def restored(module: str, kept: list[int]) -> Callable[[peft.PeftModel], None]:
    """Undo the training of a saved module's rows but the ``kept`` ones."""

    def undo(adapted: peft.PeftModel) -> None:
        wrapper = adapted.get_base_model().get_submodule(module)
        saved, original = wrapper.modules_to_save["default"], wrapper.original_module
        with torch.no_grad():
            own = saved.weight[kept].clone()
            saved.weight.copy_(original.weight)
            saved.weight[kept] = own

    return undo


def test_a_few_changed_rows_are_all_that_is_kept(tmp_path: Path, checkpoints: dict[bool, Path]) -> None:
    make(
        SavedCase(lora(modules_to_save=["embed_tokens"]), train=restored(E, [5, 17, 40])), checkpoints[False], tmp_path
    )
    delta = load(tmp_path, checkpoints[False])
    rows = delta.sites[E].rows
    assert rows is not None
    assert rows.indices is not None
    assert rows.indices.tolist() == [5, 17, 40]
    assert rows.values.shape == (3, 32)
    assert delta.sites[E].exclusive == "a saved module"
    assert delta.coverage.changes["embed_tokens"] == "own rows"
    assert delta.num_parameters == 3 * 32 + 2 * 2 * (32 + 32)


def test_a_wholly_changed_module_is_kept_whole(tmp_path: Path, checkpoints: dict[bool, Path]) -> None:
    make(SavedCase(lora(modules_to_save=["embed_tokens", "v_proj", "norm"])), checkpoints[False], tmp_path)
    delta = load(tmp_path, checkpoints[False])
    for site, shape in ((E, (V, 32)), ("model.layers.1.self_attn.v_proj", (16, 32)), ("model.norm", (32,))):
        rows = delta.sites[site].rows
        assert rows is not None
        assert rows.indices is None
        assert rows.values.shape == shape
        assert (rows.bias is not None) is (site.endswith("v_proj"))
    assert delta.coverage.changes["v_proj"] == "own weight"
    assert set(delta.exclusive.values()) == {"a saved module"}


def test_an_unchanged_module_is_no_change(tmp_path: Path, checkpoints: dict[bool, Path]) -> None:
    make(SavedCase(lora(modules_to_save=["lm_head"]), train=restored(H, [])), checkpoints[False], tmp_path)
    assert H not in load(tmp_path, checkpoints[False]).sites
    # saved in another dtype than it is served in
    file = tmp_path / "adapter_model.safetensors"
    for dtype in (torch.bfloat16, torch.float16):
        save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file)
        assert H not in load(tmp_path, checkpoints[False]).sites
        make(SavedCase(lora(modules_to_save=["lm_head"]), train=restored(H, [])), checkpoints[False], tmp_path)
    assert H not in load(tmp_path, checkpoints[False], torch.bfloat16).sites


def test_a_changed_bias_alone_keeps_its_row(tmp_path: Path, checkpoints: dict[bool, Path]) -> None:
    def train(adapted: peft.PeftModel) -> None:
        restored("model.layers.0.self_attn.v_proj", [])(adapted)
        restored("model.layers.1.self_attn.v_proj", [])(adapted)
        for layer in (0, 1):
            wrapper = adapted.get_base_model().get_submodule(f"model.layers.{layer}.self_attn.v_proj")
            with torch.no_grad():
                wrapper.modules_to_save["default"].bias.copy_(wrapper.original_module.bias)
                wrapper.modules_to_save["default"].bias[7] += layer

    make(SavedCase(lora(modules_to_save=["v_proj"]), train=train), checkpoints[False], tmp_path)
    delta = load(tmp_path, checkpoints[False])
    assert "model.layers.0.self_attn.v_proj" not in delta.sites
    rows = delta.sites["model.layers.1.self_attn.v_proj"].rows
    assert rows is not None
    assert rows.indices is not None
    assert rows.indices.tolist() == [7]
    base = oracle(checkpoints[False]).get_submodule("model.layers.1.self_attn.v_proj")
    assert rows.bias is not None
    assert rows.bias.tolist() == pytest.approx([float(base.bias.detach()[7]) + 1])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_untrained_wide_vocabulary_keeps_the_new_rows_alone(
    tmp_path: Path, checkpoints: dict[bool, Path], tied: bool
) -> None:
    make(SavedCase(lora(), vocab_size=WIDE), checkpoints[tied], tmp_path)
    delta = load(tmp_path, checkpoints[tied])
    assert delta.vocab_size == WIDE
    values = []
    for site in (E, H):
        rows = delta.sites[site].rows
        assert rows is not None
        assert rows.indices is not None
        assert rows.indices.tolist() == [V, V + 1, V + 2]
        assert delta.sites[site].exclusive == "added vocabulary"
        values.append(rows.values)
    assert torch.equal(*values) == tied


def test_a_wholly_saved_wide_vocabulary_names_every_row(tmp_path: Path, checkpoints: dict[bool, Path]) -> None:
    make(SavedCase(lora(modules_to_save=["embed_tokens", "lm_head"]), vocab_size=WIDE), checkpoints[False], tmp_path)
    found = {name: delta.rows for name, delta in load(tmp_path, checkpoints[False]).sites.items() if delta.rows}
    assert set(found) == {E, H}
    for rows in found.values():
        assert rows.indices is not None
        assert rows.indices.tolist() == list(range(WIDE))


def test_trained_tokens_stand_alone(tmp_path: Path, checkpoints: dict[bool, Path]) -> None:
    make(SavedCase(lora(trainable_token_indices=[9, 3])), checkpoints[True], tmp_path)
    delta = load(tmp_path, checkpoints[True])
    assert delta.exclusive == {E: "trained tokens", H: "trained tokens"}
    rows = delta.sites[E].rows
    assert rows is not None
    assert rows.indices is not None
    assert rows.indices.tolist() == [3, 9]
    trained = load_file(tmp_path / "adapter_model.safetensors")
    stored = trained[f"base_model.model.{E}.token_adapter.trainable_tokens_delta"]
    assert torch.equal(rows.values, stored[[1, 0]])


def test_factors_of_a_wide_vocabulary_are_as_wide_as_the_base(tmp_path: Path, checkpoints: dict[bool, Path]) -> None:
    targets = ["embed_tokens", "lm_head"]
    make(SavedCase(lora(target_modules=targets, use_dora=True), vocab_size=WIDE), checkpoints[False], tmp_path)
    delta = load(tmp_path, checkpoints[False])
    sites = {site.name: site for site in sites_of(oracle(checkpoints[False]))}
    for name in (E, H):
        change = delta.sites[name]
        assert change.low_rank is not None
        assert change.out_scale is not None
        assert change.low_rank.a.shape == (2, sites[name].in_features)
        assert change.low_rank.b.shape == (sites[name].out_features, 2)
        assert change.out_scale.shape == (sites[name].out_features,)
        weight, _ = merged(oracle(checkpoints[False]).get_submodule(name), change, sites[name].kind)
        assert weight.shape == (WIDE, 32)


def test_rows_are_rounded_once_into_the_bases_dtype(tmp_path: Path, checkpoints: dict[bool, Path]) -> None:
    make(SavedCase(lora(modules_to_save=["norm", "lm_head"])), checkpoints[False], tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    delta = load(tmp_path, checkpoints[False], torch.bfloat16)
    for site in ("model.norm", H):
        rows = delta.sites[site].rows
        assert rows is not None
        assert torch.equal(rows.values, stored[f"base_model.model.{site}.weight"].bfloat16())


def test_rows_that_leave_the_bases_range(tmp_path: Path, checkpoints: dict[bool, Path]) -> None:
    make(SavedCase(lora(trainable_token_indices=[3])), checkpoints[False], tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v * (1e6 if "token_adapter" in k else 1) for k, v in load_file(file).items()}, file)
    with pytest.raises(InvalidAdapter, match=r"trained tokens of 'model\.embed_tokens'.*range of the base's"):
        load(tmp_path, checkpoints[False], torch.float16)
