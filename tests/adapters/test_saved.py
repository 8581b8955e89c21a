"""Saved modules, trained tokens and added vocabulary compute what PEFT computes when it loads the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.adapters.peft_saved import SavedCase, dense_copy, load, logits, lora, make, reloaded
from tests.tiny import VOCAB_SIZE as V
from tests.tiny import oracle, tiny_checkpoint

WIDE = V + 3
NEW = [V, V + 1, V + 2]


def tokens(**config: Any) -> peft.TrainableTokensConfig:
    return peft.TrainableTokensConfig(**{"task_type": "CAUSAL_LM", **config})


def ia3(**config: Any) -> peft.IA3Config:
    return peft.IA3Config(**{"task_type": "CAUSAL_LM", **config})


#: made on models whose head has a matrix of its own, and on models whose head is the embedding
BOTH: dict[str, SavedCase] = {
    "norms": SavedCase(lora(modules_to_save=["norm"])),
    "one norm": SavedCase(lora(modules_to_save=["model.norm"])),
    "a linear": SavedCase(lora(modules_to_save=["down_proj", "v_proj"])),
    "a container": SavedCase(lora(modules_to_save=["mlp"])),
    "a layer": SavedCase(lora(modules_to_save=["layers.0"], layers_to_transform=[1])),
    "the model": SavedCase(lora(target_modules=["lm_head"], modules_to_save=["model"])),
    "names that no module has": SavedCase(lora(modules_to_save=["norm", "wte", "rotary_emb"])),
    "ends": SavedCase(lora(modules_to_save=["embed_tokens", "lm_head"])),
    "embedding": SavedCase(lora(modules_to_save=["embed_tokens"])),
    "head": SavedCase(lora(modules_to_save=["lm_head"])),
    "embedding, tied again": SavedCase(lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "head, tied again": SavedCase(lora(modules_to_save=["lm_head"], ensure_weight_tying=True)),
    "beside another kind": SavedCase(
        lambda: peft.LNTuningConfig(target_modules=["norm"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    ),
    "embedding saved, head adapted": SavedCase(lora(target_modules=["lm_head"], modules_to_save=["embed_tokens"])),
    "saved for the asking": SavedCase(lora(), save={"save_embedding_layers": True}),
    "tokens": SavedCase(lora(trainable_token_indices=[9, 3])),
    "tokens, tied again": SavedCase(lora(trainable_token_indices=[3, 9], ensure_weight_tying=True)),
    "tokens of both ends": SavedCase(lora(trainable_token_indices={"embed_tokens": [3, 9], "lm_head": [3, 9]})),
    "other tokens of both ends": SavedCase(lora(trainable_token_indices={"embed_tokens": [3, 9], "lm_head": [4]})),
    "tokens of the head": SavedCase(lora(trainable_token_indices={"lm_head": [4]})),
    "rows of a linear": SavedCase(lora(trainable_token_indices={"v_proj": [3, 15]})),
    "tokens under an adapted head": SavedCase(lora(target_modules=["lm_head"], trainable_token_indices=[3, 9])),
    "tokens and a saved embedding": SavedCase(
        lora(modules_to_save=["embed_tokens"], trainable_token_indices={"lm_head": [3]})
    ),
    "tokens alone": SavedCase(lambda: tokens(token_indices=[9, 3])),
    "tokens alone, by pattern": SavedCase(lambda: tokens(token_indices=[9, 3], target_modules=".*embed_tokens")),
    "tokens alone, of the head": SavedCase(lambda: tokens(token_indices=[9, 3], target_modules=["lm_head"])),
    "wide ends": SavedCase(lora(modules_to_save=["embed_tokens", "lm_head"]), vocab_size=WIDE),
    "wide embedding": SavedCase(lora(modules_to_save=["embed_tokens"]), vocab_size=WIDE),
    "wide embedding, tied again": SavedCase(
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), vocab_size=WIDE
    ),
    "wide head": SavedCase(lora(modules_to_save=["lm_head"]), vocab_size=WIDE),
    "wide, untrained": SavedCase(lora(), vocab_size=WIDE),
    "wide adapted ends": SavedCase(lora(target_modules=["embed_tokens", "lm_head", "q_proj"]), vocab_size=WIDE),
    "wide adapted embedding, saved head": SavedCase(
        lora(target_modules=["embed_tokens"], modules_to_save=["lm_head"]), vocab_size=WIDE
    ),
    "wide dora ends": SavedCase(lora(target_modules=["embed_tokens", "lm_head"], use_dora=True), vocab_size=WIDE),
    # PEFT writes its magnitudes twice
    "wide dora embedding, by its whole name": SavedCase(
        lora(target_modules=["model.embed_tokens"], use_dora=True), vocab_size=WIDE
    ),
    "wide tuned ends": SavedCase(
        lambda: peft.LNTuningConfig(target_modules=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"), vocab_size=WIDE
    ),
    "wide tokens": SavedCase(lora(trainable_token_indices=[3, *NEW]), vocab_size=WIDE),
    "some wide tokens": SavedCase(lora(trainable_token_indices=[3, V + 1]), vocab_size=WIDE),
    "wide tokens under an adapted head": SavedCase(
        lora(target_modules=["lm_head"], trainable_token_indices=[3, *NEW]), vocab_size=WIDE
    ),
    "wide tokens of both ends": SavedCase(
        lora(trainable_token_indices={"embed_tokens": [3, *NEW], "lm_head": [4, *NEW]}),
        vocab_size=WIDE,
        save={"save_embedding_layers": False},
    ),
}
#: those of modules between the ends, where families differ: qwen3 has norms of heads
INSIDE = (
    "norms",
    "one norm",
    "a linear",
    "a container",
    "a layer",
    "the model",
    "names that no module has",
    "beside another kind",
    "rows of a linear",
    "ends",
    "wide ends",
)
#: where the embedding alone says what the head's new rows are
TIED: dict[str, SavedCase] = {
    "wide adapted embedding": SavedCase(lora(target_modules=["embed_tokens"]), vocab_size=WIDE),
    "wide adapted embedding, tied again": SavedCase(
        lora(target_modules=["embed_tokens"], ensure_weight_tying=True), vocab_size=WIDE
    ),
    "wide scaled head": SavedCase(lambda: ia3(target_modules=["lm_head"], feedforward_modules=[]), vocab_size=WIDE),
    "wide head of scaled inputs": SavedCase(
        lambda: ia3(target_modules=["lm_head"], feedforward_modules=["lm_head"]), vocab_size=WIDE
    ),
    "wide tokens without copies": SavedCase(
        lora(trainable_token_indices=[3, *NEW]), vocab_size=WIDE, save={"save_embedding_layers": False}
    ),
    "wide tokens alone": SavedCase(lambda: tokens(token_indices=[3, *NEW]), vocab_size=WIDE),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("saved")
    return {
        (arch, tied): tiny_checkpoint(root, arch, tie_word_embeddings=tied)
        for arch in ("llama", "qwen3")
        for tied in (False, True)
    }


@pytest.mark.parametrize(("arch", "name"), [*(("llama", name) for name in BOTH), *(("qwen3", name) for name in INSIDE)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_it_computes_what_peft_computes(
    tmp_path: Path, checkpoints: dict[tuple[str, bool], Path], name: str, tied: bool, arch: str
) -> None:
    check(tmp_path, checkpoints[arch, tied], BOTH[name])


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_has_the_embeddings_rows(
    tmp_path: Path, checkpoints: dict[tuple[str, bool], Path], name: str
) -> None:
    check(tmp_path, checkpoints["llama", True], TIED[name])


def check(path: Path, checkpoint: Path, case: SavedCase) -> None:
    make(case, checkpoint, path)
    delta = load(path, checkpoint)
    assert delta.vocab_size == case.vocab_size
    expected = logits(reloaded(checkpoint, path, case.vocab_size), case.vocab_size or V)
    found = logits(dense_copy(checkpoint, delta), case.vocab_size or V)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    base = logits(oracle(checkpoint))
    assert not torch.allclose(logits(dense_copy(checkpoint, delta)).narrow(-1, 0, V), base, atol=1e-2)


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["v_proj", "o_proj"]},
        {"modules_to_save": ["self_attn"], "target_modules": ["down_proj"]},
        {"modules_to_save": ["v_proj"], "bias": "all"},
        {"modules_to_save": ["self_attn"], "target_modules": ["down_proj"], "bias": "all"},
        {"modules_to_save": ["k_proj"], "bias": "lora_only"},
    ],
    ids=["alone", "in a container", "beside all biases", "in a container with all biases", "beside the kind's biases"],
)
def test_saved_modules_bring_their_biases(tmp_path: Path, config: dict[str, Any]) -> None:
    checkpoint = tiny_checkpoint(tmp_path, "qwen2")
    check(tmp_path / "adapter", checkpoint, SavedCase(lora(**config)))
