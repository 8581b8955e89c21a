"""What is exported, loaded by transformers and PEFT: greedy tokens in float32 are those that are served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from peft import LoraConfig
from safetensors import safe_open

from loraplex.engine.local import LocalEngine
from loraplex.errors import UnsupportedFeature
from loraplex.types import AdapterRef, ExportFormat, Request, StopRule
from tests.engines import local_engine
from tests.exported import exporting_engine, load, merge, merged
from tests.kind_matrix import KindMatrix
from tests.kind_modules import MODULES
from tests.oracle import Alone, fresh
from tests.peft_kinds import WIDE_VOCAB, Recipe, recipes_of, save
from tests.quant.kinds import kinds_on
from tests.ranks import ranked_engine
from tests.tiny import VOCAB_SIZE, prompt, tiny_checkpoint

#: kinds whose folding differs, and whether they leave a tied head tied
TIED = {
    "lora-ends": False,
    "lora-lora-bias": True,
    "dora-ends": False,
    "ia3": True,
    "ln-tuning": True,
    "lora-saved-linear": True,
    "lora-tokens": True,
    "lora-added-tokens": True,
}
#: a config.json of state-spaces' own code, of the weights that a tiny mamba2 has
STATE_SPACES = {
    "d_model": 32,
    "n_layer": 2,
    "vocab_size": 93,
    "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "ngroups": 2, "d_state": 16},
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
OTHERS = (
    ("qwen3", False, "dora"),
    ("llama", False, "lora-resized"),
    ("mamba2", True, "lora-saved-mixer"),
    ("nemotron_h", False, "lora-saved-convolution"),
)


def answer(engine: LocalEngine, name: str, length: int = 9) -> tuple[Request, list[int]]:
    """A request, and what is served."""
    request = Request(
        name, prompt(length, seed=4), adapters=(AdapterRef(name),), stop=StopRule(max_tokens=5, ignore_eos=True)
    )
    [generation] = engine.generate([request])
    assert generation.failure is None
    return request, generation.token_ids


def config_of(path: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((path / "config.json").read_text())
    return config


def test_kinds_folded_into_a_tied_base(kinds_root: Path, tmp_path: Path) -> None:
    matrix = KindMatrix(kinds_root, "llama", tied=True)
    engine = exporting_engine(matrix, tmp_path)
    load(engine, matrix, *TIED)
    for name, tied in TIED.items():
        model = merged(engine, name, tmp_path)
        for case in matrix.cases(name):
            assert model.greedy(case.request.prompt_token_ids, len(case.expected)) == list(case.expected), name
        config = config_of(tmp_path / f"{name}-merged")
        assert config["tie_word_embeddings"] is tied, name
        assert config["vocab_size"] == (WIDE_VOCAB if name == "lora-added-tokens" else VOCAB_SIZE)
        with safe_open(tmp_path / f"{name}-merged" / "model.safetensors", framework="pt") as file:
            assert ("lm_head.weight" in file.keys()) is not tied, name  # noqa: SIM118 - a safe_open handle is no mapping


@pytest.mark.parametrize(("base", "tied", "name"), OTHERS)
def test_kinds_folded_into_other_bases(kinds_root: Path, tmp_path: Path, base: str, tied: bool, name: str) -> None:
    matrix = KindMatrix(kinds_root, base, tied=tied)
    engine = exporting_engine(matrix, tmp_path)
    load(engine, matrix, name)
    model = merged(engine, name, tmp_path, max_shard_bytes=20_000)
    assert len(list((tmp_path / f"{name}-merged").glob("model-*.safetensors"))) > 2
    for case in matrix.cases(name):
        assert model.greedy(case.request.prompt_token_ids, len(case.expected)) == list(case.expected)


def test_biases_are_switched_on_where_the_family_can_have_them(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path, "llama")
    save(recipes_of(MODULES["llama"])["lora-lora-bias"], base, tmp_path / "adapter", seed=3)
    engine = local_engine(base, adapter_dirs=(tmp_path,), export_dirs=(tmp_path,))
    engine.load_adapter("bias", str(tmp_path / "adapter"))
    request, tokens = answer(engine, "bias")
    assert merged(engine, "bias", tmp_path).greedy(request.prompt_token_ids, 5) == tokens
    config = config_of(tmp_path / "bias-merged")
    assert config["attention_bias"] is config["mlp_bias"] is True


def test_modules_that_get_a_bias_with_others_get_zeros(tmp_path: Path) -> None:
    """The flag of config.json is of all four; the adapter shifts one."""
    base = tiny_checkpoint(tmp_path, "llama")
    recipe = Recipe(lambda: LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    save(recipe, base, tmp_path / "adapter", seed=3)
    engine = local_engine(base, adapter_dirs=(tmp_path,), export_dirs=(tmp_path,))
    engine.load_adapter("bias", str(tmp_path / "adapter"))
    request, tokens = answer(engine, "bias")
    assert merged(engine, "bias", tmp_path).greedy(request.prompt_token_ids, 5) == tokens
    with safe_open(tmp_path / "bias-merged" / "model.safetensors", framework="pt") as file:
        changed = {key: bool(file.get_tensor(key).any()) for key in file.keys() if key.endswith(".bias")}  # noqa: SIM118
    assert changed == {
        f"model.layers.{layer}.self_attn.{name}_proj.bias": name == "q" for layer in range(2) for name in "koqv"
    }


def test_a_base_of_state_spaces_own_code_is_written_in_its_words(tmp_path: Path) -> None:
    """Which say otherwise how many tokens there are: transformers does not read them, the server does."""
    theirs, own = tiny_checkpoint(tmp_path, "mamba2", tie_word_embeddings=True), tmp_path / "own"
    own.mkdir()
    shutil.copy(theirs / "model.safetensors", own)
    (own / "config.json").write_text(json.dumps(STATE_SPACES))
    save(recipes_of(MODULES["mamba2"])["lora-added-tokens"], theirs, tmp_path / "adapter", seed=3)
    engine = local_engine(own, adapter_dirs=(tmp_path,), export_dirs=(tmp_path,))
    engine.load_adapter("wide", str(tmp_path / "adapter"))
    ids = (*prompt(9, seed=4), WIDE_VOCAB - 1)
    request = Request("r", ids, (AdapterRef("wide"),), stop=StopRule(max_tokens=5, ignore_eos=True))
    [served] = engine.generate([request])
    engine.export_adapter("wide", "merged", ExportFormat.MERGED)
    assert config_of(tmp_path / "merged").keys() == STATE_SPACES.keys() | {"torch_dtype"}
    [again] = local_engine(tmp_path / "merged").generate([msgspec.structs.replace(request, adapters=())])
    assert again.failure is served.failure is None
    assert again.token_ids == served.token_ids


def test_a_bias_that_the_family_cannot_have_is_refused(kinds_root: Path, tmp_path: Path) -> None:
    matrix = KindMatrix(kinds_root, "qwen3", tied=False)
    engine = exporting_engine(matrix, tmp_path)
    load(engine, matrix, "lora-lora-bias", "alora")
    with pytest.raises(UnsupportedFeature, match=r"adds a bias at 'model\.layers\.0\.mlp\.down_proj' \(6 such modules"):
        merged(engine, "lora-lora-bias", tmp_path)
    with pytest.raises(UnsupportedFeature, match=r"activated LoRA.*has no MERGED form"):
        merged(engine, "alora", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_quantized_base_is_written_dense(kinds_root: Path, tmp_path: Path) -> None:
    matrix = kinds_on(kinds_root, "nf4")
    engine = exporting_engine(matrix, tmp_path)
    load(engine, matrix, "lora")
    model, case = merged(engine, "lora", tmp_path), matrix.cases("lora")[0]
    assert model.greedy(case.request.prompt_token_ids, len(case.expected)) == list(case.expected)
    assert config_of(matrix.base_dir).keys() - config_of(tmp_path / "lora-merged").keys() == {"quantization_config"}


@pytest.mark.parametrize(("base", "tied", "name"), [("llama", True, "lora-ends"), ("mamba2", True, "lora-saved-mixer")])
def test_a_base_of_two_ranks_is_written_whole(
    kinds_root: Path, tmp_path: Path, base: str, tied: bool, name: str
) -> None:
    matrix = KindMatrix(kinds_root, base, tied=tied)
    options = {"adapter_dirs": (matrix.root,), "export_dirs": (tmp_path,)}
    with ranked_engine(matrix.base_dir, 2, **options) as ranked:  # type: ignore[arg-type]
        load(ranked.engine, matrix, name)
        over_two = merged(ranked.engine, name, tmp_path)
    case = matrix.cases(name)[0]
    assert over_two.greedy(case.request.prompt_token_ids, len(case.expected)) == list(case.expected)
    alone = exporting_engine(matrix, tmp_path / "alone")
    load(alone, matrix, name)
    merged(alone, name, tmp_path / "alone")
    files = [tmp_path / folder / f"{name}-merged" / "model.safetensors" for folder in (".", "alone")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("base", ["llama", "mamba2"])
def test_merges_as_loras_that_peft_loads(kinds_root: Path, tmp_path: Path, base: str) -> None:
    matrix = KindMatrix(kinds_root, base, tied=True)
    engine = exporting_engine(matrix, tmp_path)
    load(engine, matrix, "lora", "lora-ends", "lora-ranks", "lora-lora-bias", "lora-saved-norm", "trainable-tokens")
    merge(engine, "ends", {"lora-ranks": 0.6, "lora-ends": -0.4})
    merge(engine, "biases", {"lora": 0.5, "lora-lora-bias": 0.7})
    merge(engine, "saved", {"lora-saved-norm": 1.0, "lora": 0.3}, max_error=0.2)
    merge(engine, "tokens", {"lora": 0.5, "trainable-tokens": 1.0})
    for name in ("ends", "biases", "saved", "tokens"):
        request, tokens = answer(engine, name)
        engine.export_adapter(name, name)
        assert Alone.on(fresh(matrix.base_dir), tmp_path / name).greedy(request.prompt_token_ids, 5) == tokens, name
        engine.load_adapter(f"{name}-again", name)
        assert answer(engine, f"{name}-again")[1] == tokens
        recipe = json.loads((tmp_path / name / "merge_recipe.json").read_text())
        assert [one["weight"] for one in recipe["inputs"]]
    request, tokens = answer(engine, "ends")
    assert merged(engine, "ends", tmp_path).greedy(request.prompt_token_ids, 5) == tokens
    assert (tmp_path / "ends-merged" / "merge_recipe.json").is_file()


def test_merges_that_no_lora_can_say_are_refused(kinds_root: Path, tmp_path: Path) -> None:
    matrix = KindMatrix(kinds_root, "llama", tied=True)
    engine = exporting_engine(matrix, tmp_path)
    load(engine, matrix, "lora-ends", "lora-lora-bias", "dora", "ln-tuning")
    merge(engine, "both", {"lora-ends": 0.5, "lora-lora-bias": 1.0})
    merge(engine, "scaled", {"dora": 1.0})
    merge(engine, "norms", {"ln-tuning": 1.0})
    for name, reason in {
        "both": "changes the embedding 'model.embed_tokens' and adds biases",
        "scaled": r"scales what the base gives at 'model\.layers\.0\.self_attn\.q_proj'",
        "norms": "changes nothing by factors",
    }.items():
        with pytest.raises(UnsupportedFeature, match=reason):
            engine.export_adapter(name, name, ExportFormat.PEFT)
    assert not list(tmp_path.iterdir())
