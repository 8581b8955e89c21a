"""Adapters of state-space models: what PEFT makes and reads, names by other code, and what is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.cut import cut
from loraplex.adapters.delta import AdapterDelta
from loraplex.adapters.load import load_adapter
from loraplex.adapters.reading.source import any_directory
from loraplex.config import ModelConfig
from loraplex.errors import LoraplexError, Mismatch, UnsupportedFeature
from loraplex.models.loader import plan_model
from loraplex.models.sites import Site, SiteKind
from loraplex.parallel.runs import take
from tests.adapters.peft_saved import LIMIT, SavedCase, dense_copy, load, logits, make, quiet, reloaded
from tests.adapters.peft_saved import lora as any_lora
from tests.fakes_adapters import view_of
from tests.tiny import VOCAB_SIZE as V
from tests.tiny import oracle, tiny_checkpoint

WIDE = V + 3
NEW = [V, V + 1, V + 2]
FAMILIES = ("mamba2", "bamba", "falcon_h1", "nemotron_h", "granitemoehybrid")
#: families whose mixers are not called ``mamba``
MIXERS = {"mamba2": "mixer", "nemotron_h": "mixer"}


def lora(**config: Any) -> Callable[[], peft.PeftConfig]:
    return any_lora(**{"target_modules": ["in_proj"], **config})


def tuned(*modules: str) -> Callable[[], peft.PeftConfig]:
    return lambda: peft.LNTuningConfig(target_modules=list(modules), task_type="CAUSAL_LM")


#: of all families
INSIDE: dict[str, SavedCase] = {
    "lora": SavedCase(lora()),
    "dora": SavedCase(lora(use_dora=True)),
    "all linear but one": SavedCase(lora(target_modules="all-linear", exclude_modules=["out_proj"])),
    "all biases": SavedCase(lora(bias="all")),
    "a convolution": SavedCase(lora(modules_to_save=["conv1d"])),
    "norms": SavedCase(lora(modules_to_save=["norm"])),
    "names of vectors, which are no modules": SavedCase(lora(modules_to_save=["out_proj", "D", "A_log"])),
    "scales": SavedCase(
        lambda: peft.IA3Config(target_modules=["in_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    ),
    "layers": SavedCase(lora(layers_to_transform=[0])),
}
#: of a model whose embedding PEFT does not know by its name
ENDS: dict[str, SavedCase] = {
    "embedding": SavedCase(lora(modules_to_save=["embeddings"])),
    "embedding, asked to be tied": SavedCase(lora(modules_to_save=["embeddings"], ensure_weight_tying=True)),
    "head, asked to be tied": SavedCase(lora(modules_to_save=["lm_head"], ensure_weight_tying=True)),
    "ends": SavedCase(lora(modules_to_save=["embeddings", "lm_head"])),
    "the model": SavedCase(lora(target_modules=["lm_head"], modules_to_save=["backbone"])),
    "adapted embedding": SavedCase(lora(target_modules=["embeddings", "in_proj"])),
    "adapted head": SavedCase(lora(target_modules=["lm_head"])),
    "tokens": SavedCase(lora(trainable_token_indices=[9, 3])),
    "tokens by name": SavedCase(lora(trainable_token_indices={"embeddings": [9, 3]})),
    "tokens alone": SavedCase(lambda: peft.TrainableTokensConfig(token_indices=[9, 3], task_type="CAUSAL_LM")),
    "wide ends": SavedCase(lora(modules_to_save=["embeddings", "lm_head"]), vocab_size=WIDE),
    "wide, untrained": SavedCase(lora(), vocab_size=WIDE),
    "wide adapted embedding": SavedCase(lora(target_modules=["embeddings", "in_proj"]), vocab_size=WIDE),
    "wide tokens": SavedCase(lora(trainable_token_indices=[3, *NEW]), vocab_size=WIDE),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("states")


def mixer(family: str) -> str:
    return MIXERS.get(family, "mamba")


def checkpoint(root: Path, family: str, **overrides: object) -> Path:
    biases = {"use_bias": True} if family in MIXERS else {}
    return tiny_checkpoint(root, family, **{**biases, **overrides})


def check(path: Path, base: Path, case: SavedCase) -> AdapterDelta:
    make(case, base, path)
    delta = load(path, base)
    assert delta.vocab_size == case.vocab_size
    size = case.vocab_size or V
    found = logits(dense_copy(base, delta), size)
    torch.testing.assert_close(found, logits(reloaded(base, path, case.vocab_size), size), rtol=1e-4, atol=2e-4)
    assert not torch.allclose(found[:V, :V], logits(oracle(base))[:, :V][: len(found[:V])], atol=1e-2)
    return delta


def modules(delta: AdapterDelta) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in delta.sites}


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("family", ["mamba2", "falcon_h1"])
def test_it_computes_what_peft_computes(tmp_path: Path, root: Path, family: str, name: str) -> None:
    check(tmp_path, checkpoint(root, family), INSIDE[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_mixer_brings_everything_in_it(tmp_path: Path, root: Path, family: str) -> None:
    base = checkpoint(root, family)
    saved = SavedCase(lora(target_modules=["lm_head"], modules_to_save=[f"layers.0.{mixer(family)}"]))
    delta = check(tmp_path / "saved", base, saved)
    inside = {"in_proj", "conv1d", "dt_bias", "A_log", "D", "norm", "out_proj"}
    assert modules(delta) == inside | {"lm_head"}
    if family not in MIXERS:  # they call it by keywords, which PEFT's layer around it does not take
        return
    tuned_whole = check(tmp_path / "tuned", base, SavedCase(tuned(f"layers.0.{mixer(family)}")))
    assert modules(tuned_whole) == inside
    for name, change in tuned_whole.sites.items():
        if name.endswith("conv1d"):
            assert change.rows is not None
            assert tuple(change.rows.values.shape) == (len(change.rows.values), 4)
            assert change.rows.bias is not None
        assert change.exclusive


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_ends_by_another_name(tmp_path: Path, root: Path, name: str, tied: bool) -> None:
    check(tmp_path, checkpoint(root, "mamba2", tie_word_embeddings=tied), ENDS[name])


def test_one_bias_of_a_convolution_is_all_of_its_rows(tmp_path: Path, root: Path) -> None:
    base = checkpoint(root, "mamba2")
    delta = check(tmp_path, base, SavedCase(lora(bias="all")))
    change = delta.sites["backbone.layers.0.mixer.conv1d"]
    assert change.change() == "own weight"
    assert change.exclusive == "a convolution with a bias of its own"
    assert change.rows is not None
    weight = oracle(base).get_parameter("backbone.layers.0.mixer.conv1d.weight")
    assert torch.equal(change.rows.values, weight.squeeze(1))


def test_what_is_the_bases_is_not_there(tmp_path: Path, root: Path) -> None:
    """A mixer that was saved as it was has no site; of one in which a vector was trained there is the vector."""
    base = checkpoint(root, "mamba2")

    def only_a_log(model: peft.PeftModel) -> None:
        fresh = dict(oracle(base).named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                own = re.sub(r"\.modules_to_save\.default", "", name.removeprefix("base_model.model."))
                if own in fresh and "lora_" not in name:
                    parameter.copy_(fresh[own] + (0.5 if own.endswith("layers.1.mixer.A_log") else 0))

    make(SavedCase(lora(target_modules=["lm_head"], modules_to_save=["mixer"]), train=only_a_log), base, tmp_path)
    assert set(load(tmp_path, base).sites) == {"backbone.layers.1.mixer.A_log", "lm_head"}


@pytest.mark.parametrize("family", ["mamba2", "nemotron_h"])
def test_out_proj_is_served_where_other_trainers_adapt_it(
    tmp_path: Path, root: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, config = checkpoint(root, family), lora(target_modules=["in_proj", "out_proj"])
    with pytest.raises(ValueError, match="out_proj"):
        make(SavedCase(config), base, tmp_path)
    monkeypatch.setattr(peft.tuners.tuners_utils, "_check_lora_target_modules_mamba", lambda *_: None)
    assert modules(check(tmp_path, base, SavedCase(config))) == {"in_proj", "out_proj"}


def written(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Change an adapter's files."""
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    change(config, tensors)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["lora", "adalora", "loha", "ln_tuning"])
def test_nothing_is_put_around_a_convolution(tmp_path: Path, root: Path, kind: str) -> None:
    base = checkpoint(root, "mamba2")
    configs: dict[str, Callable[[], peft.PeftConfig]] = {
        "lora": lora(),
        "adalora": lambda: peft.AdaLoraConfig(target_modules=["in_proj"], total_step=1, task_type="CAUSAL_LM"),
        "loha": lambda: peft.LoHaConfig(target_modules=["in_proj"], task_type="CAUSAL_LM"),
        "ln_tuning": tuned("norm"),
    }
    make(SavedCase(configs[kind]), base, tmp_path)

    def also_the_convolution(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config["target_modules"].append("conv1d")
        tensors["base_model.model.backbone.layers.0.mixer.conv1d.lora_A.weight"] = torch.zeros(2, 96, 4)

    written(tmp_path, also_the_convolution)
    with pytest.raises(
        UnsupportedFeature, match=r"matches 'backbone\.layers\.0\.mixer\.conv1d', a convolution"
    ) as caught:
        load(tmp_path, base)
    assert caught.value.field == "target_modules"


def test_peft_reads_no_convolution_that_was_tuned_beside_its_layer(tmp_path: Path, root: Path) -> None:
    """Why LN tuning of one is refused: with it PEFT computes what the base does."""
    base = checkpoint(root, "mamba2")
    make(SavedCase(tuned("conv1d")), base, tmp_path)
    assert torch.equal(logits(reloaded(base, tmp_path)), logits(oracle(base)))
    with pytest.raises(UnsupportedFeature, match="a convolution of each channel"):
        load(tmp_path, base)


def test_factors_of_a_tied_head_that_peft_reads_half_back_are_refused(tmp_path: Path, root: Path) -> None:
    """PEFT ties the head's factors to the embedding's, and saves a config by which it does not tie them again."""
    base = checkpoint(root, "mamba2", tie_word_embeddings=True)
    make(SavedCase(lora(target_modules=["lm_head"], ensure_weight_tying=True)), base, tmp_path)
    with pytest.raises(Mismatch, match="not selected by target_modules: lm_head"):
        load(tmp_path, base)


def served_view(base: Path) -> BaseView:
    """What the server's own model says of itself, over transformers' weights."""
    spec = plan_model(base, ModelConfig(device="cpu", dtype="float32")).spec
    return replace(view_of(oracle(base)), sites=spec.sites(), aliases=spec.names.aliases)


def loaded(path: Path, base: BaseView) -> AdapterDelta:
    return load_adapter(any_directory(str(path)), base, max_bytes=LIMIT)


@pytest.mark.parametrize(
    ("family", "part"),
    [("mamba2", "z and x alone"), ("mamba2", "another n_groups"), ("granitemoehybrid", "gate alone")],
)
def test_factors_of_some_outputs_alone_say_what_the_outputs_are(
    tmp_path: Path, root: Path, family: str, part: str
) -> None:
    base = checkpoint(root, family)
    packed = part == "gate alone"
    module = "input_linear" if packed else "in_proj"
    make(SavedCase(lora(target_modules=[module])), base, tmp_path)
    rows = {"z and x alone": 128, "another n_groups": 64 * 2 + 2 * 16 * 4 + 8, "gate alone": 48}[part]

    def fewer(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("lora_B.weight"):
                tensors[name] = torch.ones(rows, tensor.shape[1])

    written(tmp_path, fewer)
    outputs = "gate 48, up 48" if packed else "z 64, x 64, B 32, C 32, dt 8"
    with pytest.raises(Mismatch, match=rf"\[{rows}, 2\].*or for some of the outputs, which are {outputs}$"):
        loaded(tmp_path, served_view(base))


def spelt(path: Path, ours: str, theirs: str) -> None:
    """Files as other model code names its modules."""

    def rename(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(f"base_model.model.{ours}", f"base_model.model.{theirs}")] = tensors.pop(name)
        for key in ("target_modules", "modules_to_save"):
            found = config.get(key)
            if isinstance(found, list):
                config[key] = [re.sub(rf"^{re.escape(ours)}", theirs, name) for name in found]
        if isinstance(config.get("rank_pattern"), dict):
            config["rank_pattern"] = {re.sub(rf"^{ours}", theirs, key): r for key, r in config["rank_pattern"].items()}

    written(path, rename)


@pytest.mark.parametrize(
    ("family", "ours", "theirs"),
    [("nemotron_h", "model.", "backbone."), ("mamba2", "backbone.embeddings", "backbone.embedding")],
)
def test_names_may_be_those_of_other_model_code(
    tmp_path: Path, root: Path, family: str, ours: str, theirs: str
) -> None:
    base = checkpoint(root, family)
    view = served_view(base)
    layer = "model.layers.0" if family == "nemotron_h" else "backbone.layers.0"
    embedding = "model.embeddings" if family == "nemotron_h" else "backbone.embeddings"
    config = lora(
        use_dora=True,
        target_modules=[f"{layer}.mixer.in_proj", "q_proj"],
        modules_to_save=[f"{layer}.mixer.conv1d", embedding],
        rank_pattern={f"{layer}.mixer.in_proj": 3},
    )
    make(SavedCase(config), base, tmp_path)
    expected = loaded(tmp_path, view)
    assert {f"{layer}.mixer.in_proj", f"{layer}.mixer.conv1d", embedding} <= set(expected.sites)
    spelt(tmp_path, ours, theirs)
    found = loaded(tmp_path, view)
    assert list(found.sites) == list(expected.sites)
    assert found.telling_tokens == expected.telling_tokens
    for name, change in expected.sites.items():
        assert len(change.tensors) == len(found.sites[name].tensors)
        for mine, theirs_ in zip(change.tensors, found.sites[name].tensors, strict=True):
            assert torch.equal(mine, theirs_), name
    with pytest.raises(LoraplexError, match=re.escape(theirs)):
        loaded(tmp_path, replace(view, aliases=()))


def test_names_of_both_spellings_in_one_file_land_nowhere(tmp_path: Path, root: Path) -> None:
    base = checkpoint(root, "nemotron_h")
    make(SavedCase(lora()), base, tmp_path)

    def half(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if ".layers.0." in name)
        tensors[name.replace(".model.model.", ".model.backbone.")] = tensors.pop(name)

    written(tmp_path, half)
    with pytest.raises(Mismatch, match=r"backbone\.layers\.0"):
        loaded(tmp_path, served_view(base))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_rank_has_of_own_rows_what_it_has_of_the_base(tmp_path: Path, root: Path, size: int) -> None:
    base = checkpoint(root, "mamba2")
    view = served_view(base)
    with quiet():
        make(SavedCase(lora(target_modules=["lm_head"], modules_to_save=["mixer"])), base, tmp_path)
    delta = loaded(tmp_path, view)
    kinds: set[SiteKind] = set()
    for rank in range(size):
        parts = cut(delta.sites, view.by_name(), rank, size)
        for site in view.sites:
            whole = delta.sites.get(site.name)
            if whole is None or whole.rows is None or site.module == "out_proj":
                continue
            kinds.add(site.kind)
            rows = parts[site.name].rows
            assert rows is not None
            runs = site.part(rank, size).rows
            assert torch.equal(rows.values, take(whole.rows.values, runs)), site.name
            if whole.rows.bias is not None:
                assert rows.bias is not None
                assert torch.equal(rows.bias, take(whole.rows.bias, runs))
    assert kinds == {SiteKind.LINEAR, SiteKind.CONV, SiteKind.VECTOR, SiteKind.NORM}


def test_what_a_site_says_of_itself() -> None:
    vector, conv = Site("mixer.D", SiteKind.VECTOR, 8, 8), Site("mixer.conv1d", SiteKind.CONV, 4, 96, bias=True)
    head, embedding = Site("lm_head", SiteKind.LINEAR, 32, 96), Site("wte", SiteKind.EMBEDDING, 96, 32)
    assert [site.weight_shape for site in (vector, conv)] == [(8,), (96, 1, 4)]
    assert [site.rows_shape for site in (vector, conv, head, embedding)] == [(8,), (96, 4), (96, 32), (96, 32)]
    assert [site.is_end for site in (vector, conv, head, embedding)] == [False, False, True, True]
    assert [site.has_matrix for site in (vector, conv, head, embedding)] == [False, False, True, True]
