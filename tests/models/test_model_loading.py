"""Checkpoints on disk: shards, dtypes, progress, and every way they can be wrong, each named."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.config import ModelConfig
from loraplex.errors import InvalidConfig, InvalidModel, LoraplexError, NotFound, UnsupportedFeature
from loraplex.models.assemble import Runtime
from loraplex.models.loader import load_model, plan_model
from loraplex.models.placement import cpu_multiplies_bfloat16
from loraplex_kernels.attention.reference import ReferenceAttention
from loraplex_kernels.lora.reference import ReferenceLora
from tests.tiny import Chunk, PackedRunner, load_tiny, prompt, tiny_checkpoint

RUNTIME = Runtime(ReferenceLora(), ReferenceAttention(), adapter_memory=1 << 20)


@pytest.fixture
def checkpoint(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint(tmp_path_factory.getbasetemp(), "llama"), tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tiny_checkpoint(tmp_path_factory.getbasetemp(), "llama", max_shard_size="20KB")
    return Path(shutil.copytree(source, tmp_path / "sharded"))


def change(checkpoint: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors; ``__`` stands for a dot."""
    path = checkpoint / "model.safetensors"
    held = load_file(path)
    for key, tensor in tensors.items():
        held.pop(key.replace("__", "."), None)
        if tensor is not None:
            held[key.replace("__", ".")] = tensor
    save_file(held, path, metadata={"format": "pt"})


def configure(checkpoint: Path, **values: object) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def logits(checkpoint: Path, **options: str) -> torch.Tensor:
    return PackedRunner(load_tiny(checkpoint, **options)).step([Chunk("s", prompt(8))])[0]


def test_progress_counts_every_byte(sharded: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = ModelConfig(device="cpu", dtype="float32")
    load_model(plan_model(sharded, config), RUNTIME, lambda done, total: seen.append((done, total)))
    total = 4 * sum(t.numel() for file in sharded.glob("*.safetensors") for t in load_file(file).values())
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > 10


def test_harmless_extras_are_ignored(checkpoint: Path) -> None:
    before = logits(checkpoint)
    change(checkpoint, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert torch.equal(logits(checkpoint), before)


def test_tied_head_is_the_embedding(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny_checkpoint(tmp_path_factory.getbasetemp(), "llama", tie_word_embeddings=True)
    tied = Path(shutil.copytree(source, tmp_path / "tied"))
    before = logits(tied)
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    caplog.set_level(logging.WARNING)
    change(tied, lm_head__weight=embedding.clone())
    assert torch.equal(logits(tied), before)
    assert not caplog.records
    change(tied, lm_head__weight=torch.zeros_like(embedding))
    assert torch.equal(logits(tied), before)
    assert "lm_head.weight differs from model.embed_tokens.weight" in caplog.text


SPOILS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "missing": ({"model__layers__1__mlp__up_proj__weight": None}, r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
    "many missing": (
        {f"model__layers__{i}__{n}_layernorm__weight": None for i in (0, 1) for n in ("input", "post_attention")},
        "layernorm",
    ),
    "unused": ({"model__layers__0__mlp__extra__weight": torch.ones(2)}, r"holds model\.layers\.0\.mlp\.extra\.weight"),
    "bias nobody asked for": ({"model__layers__0__self_attn__q_proj__bias": torch.ones(32)}, r"q_proj\.bias"),
    "shape": (
        {"model__layers__0__self_attn__k_proj__weight": torch.ones(32, 32)},
        r"k_proj\.weight' has shape \[32, 32\], config\.json calls for \[16, 32\]",
    ),
    "norm shape": ({"model__norm__weight": torch.ones(32, 1)}, r"model\.norm\.weight"),
    "integers": ({"model__norm__weight": torch.ones(32, dtype=torch.int8)}, r"norm\.weight' is torch\.int8"),
}


@pytest.mark.parametrize("case", list(SPOILS))
def test_wrong_tensors_are_named(case: str, checkpoint: Path) -> None:
    tensors, message = SPOILS[case]
    change(checkpoint, **tensors)
    with pytest.raises(InvalidModel, match=message):
        load_tiny(checkpoint)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: data + b"more",
    ],
    ids=["half", "five bytes", "empty", "header length", "header text", "trailing"],
)
def test_broken_safetensors_are_named(spoil: object, checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(InvalidModel, match=r"model\.safetensors"):
        load_tiny(checkpoint)


def test_broken_index(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    (sharded / names[0]).unlink()
    with pytest.raises(InvalidModel, match=names[0]):
        load_tiny(sharded)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../other.safetensors"}}))
    with pytest.raises(InvalidModel, match=r"\.\./other"):
        load_tiny(sharded)
    index.write_text(json.dumps({}))
    with pytest.raises(InvalidModel, match="weight_map"):
        load_tiny(sharded)


def test_a_tensor_in_two_files(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = sorted(set(weight_map.values()))[0]
    shutil.copy(sharded / first, sharded / "again.safetensors")
    index.write_text(json.dumps({"weight_map": {**weight_map, "again": "again.safetensors"}}))
    with pytest.raises(InvalidModel, match="stands in"):
        load_tiny(sharded)


def test_no_weights_at_all(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InvalidModel, match=r"neither model\.safetensors nor"):
        load_tiny(checkpoint)


REFUSED_OPTIONS: list[tuple[ModelConfig, type[LoraplexError], str]] = [
    (ModelConfig(dtype="int3"), InvalidConfig, "dtype 'int3'"),
    (ModelConfig(device="tpu"), InvalidConfig, "device 'tpu'"),
    (ModelConfig(load_format="pickle"), InvalidConfig, "load format 'pickle'"),
    (ModelConfig(quantization="nf3"), UnsupportedFeature, "quantization 'nf3'; allowed are none, nf4, fp4, int8, fp8"),
]


@pytest.mark.parametrize(("config", "error", "message"), REFUSED_OPTIONS, ids=lambda value: str(value)[:20])
def test_options_we_lack(config: ModelConfig, error: type[LoraplexError], message: str, checkpoint: Path) -> None:
    with pytest.raises(error, match=message):
        load_model(plan_model(checkpoint, config), RUNTIME, lambda done, total: None)


def test_quantized_checkpoint_is_refused_by_name(checkpoint: Path) -> None:
    configure(checkpoint, quantization_config={"quant_method": "hqq", "bits": 4})
    with pytest.raises(UnsupportedFeature, match=r"quant_method 'hqq'"):
        load_tiny(checkpoint)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nothing-here"):
        load_tiny(tmp_path / "nothing-here")


def test_auto_dtype_follows_the_checkpoint(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert load_tiny(checkpoint, dtype="auto").dtype is torch.float32
    configure(checkpoint, dtype="bfloat16")
    expected = torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32
    assert load_tiny(checkpoint, dtype="auto").dtype is expected
    configure(checkpoint, dtype=None, torch_dtype="float16")
    assert load_tiny(checkpoint, dtype="auto").dtype is torch.float32
    assert "model runs on cpu in float32" in caplog.text


def test_dummy_weights_are_finite_and_repeatable(tmp_path: Path, checkpoint: Path) -> None:
    shutil.copy(checkpoint / "config.json", tmp_path / "config.json")
    first = logits(tmp_path, load_format="dummy")
    assert first.isfinite().all()
    assert 0.1 < first.std() < 10
    assert torch.equal(first, logits(tmp_path, load_format="dummy"))
