"""LoRA at every site, through the tables, against PEFT on transformers: one packed batch, an adapter a sequence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from loraplex.models.base import BaseModel
from loraplex_kernels.lora import LoraBackend
from loraplex_kernels.lora.reference import ReferenceLora
from loraplex_kernels.segments import Term
from tests.tiny import (
    ALL_LINEAR,
    Chunk,
    PackedRunner,
    add_peft_adapters,
    load_tiny,
    oracle,
    peft_factors,
    prompt,
    tiny_checkpoint,
    write_slot,
)

TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}

ADAPTERS = {
    "linear": LoraConfig(r=4, lora_alpha=8, target_modules=list(ALL_LINEAR), init_lora_weights=False),
    "ends": LoraConfig(r=3, lora_alpha=6, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False),
    "patterns": LoraConfig(
        r=8,
        lora_alpha=16,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "up_proj", "embed_tokens"],
        rank_pattern={"q_proj": 1, "up_proj": 16},
        alpha_pattern={"v_proj": 3},
        init_lora_weights=False,
    ),
    "one_part": LoraConfig(r=2, lora_alpha=2, target_modules=["k_proj", "down_proj"], init_lora_weights=False),
}
#: ours, PEFT's, and the backend whose tables ours has
Adapted = tuple[BaseModel, object, LoraBackend]
SLOTS = {name: slot for slot, name in enumerate(ADAPTERS)}


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "mistral"])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    checkpoint = tiny_checkpoint(tmp_path_factory.getbasetemp(), request.param, sliding_window=5)
    return _adapted(checkpoint)


def _adapted(checkpoint: Path) -> Adapted:
    theirs = add_peft_adapters(oracle(checkpoint), ADAPTERS)
    lora = ReferenceLora()
    ours = load_tiny(checkpoint, lora=lora)
    for name, slot in SLOTS.items():
        write_slot(ours, slot, peft_factors(theirs, name))
    return ours, theirs, lora


@torch.inference_mode()
def test_mixed_batch_equals_peft(adapted: Adapted) -> None:
    ours, theirs, lora = adapted
    runner = PackedRunner(ours, lora=lora)
    prompts = {name: prompt(5 + 3 * slot, seed=slot) for name, slot in SLOTS.items()}
    chunks = [Chunk(name, ids[:-2], (Term(SLOTS[name]),)) for name, ids in prompts.items()]
    first = runner.step([*chunks, Chunk("base", prompt(7, seed=8))])
    # a step of decodes, and a step of both
    second = runner.step([Chunk(name, ids[-2:-1], (Term(SLOTS[name]),)) for name, ids in prompts.items()])
    chunks = [Chunk(name, ids[-1:], (Term(SLOTS[name]),)) for name, ids in prompts.items()]
    third = runner.step([*chunks, Chunk("late", prompt(4, seed=9))])
    for i, (name, ids) in enumerate(prompts.items()):
        theirs.set_adapter(name)
        expected = theirs(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(torch.cat((first[i], second[i], third[i])), expected, **TOLERANCE)
    with theirs.disable_adapter():
        torch.testing.assert_close(first[-1], theirs(torch.tensor([prompt(7, seed=8)])).logits[0], **TOLERANCE)
        torch.testing.assert_close(third[-1], theirs(torch.tensor([prompt(4, seed=9)])).logits[0], **TOLERANCE)


@pytest.mark.parametrize("name", list(ADAPTERS))
@torch.inference_mode()
def test_every_adapter_changes_the_logits(name: str, adapted: Adapted) -> None:
    ours, _, lora = adapted
    ids = prompt(6)
    base, with_adapter = PackedRunner(ours, lora=lora).step(
        [Chunk("base", ids), Chunk(name, ids, (Term(SLOTS[name]),))]
    )
    assert (base - with_adapter).abs().max() > 0.01


@torch.inference_mode()
def test_tied_ends_are_adapted_apart(tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = tiny_checkpoint(tmp_path_factory.getbasetemp(), "llama", tie_word_embeddings=True)
    ours, theirs, lora = _adapted(checkpoint)
    theirs.set_adapter("ends")
    ids = prompt(12)
    expected = theirs(torch.tensor([ids])).logits[0]
    logits = PackedRunner(ours, lora=lora).step([Chunk("s", ids, (Term(SLOTS["ends"]),))])[0]
    torch.testing.assert_close(logits, expected, **TOLERANCE)
