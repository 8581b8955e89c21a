"""Every family against transformers in float32: whole prompts, chunks, decode steps, packed batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.family_checks import check_packed_as_alone, check_prompt_chunks_and_decodes
from tests.tiny import Chunk, PackedRunner, load_tiny, oracle, prompt, tiny_checkpoint

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-gelu-tanh": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-no-groups": ("llama", {"num_key_value_heads": 4}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-head-dim": ("llama", {"head_dim": 24}),
    "llama-sharded": ("llama", {"max_shard_size": "20KB"}),
    "llama-llama3": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-sliding": ("qwen2", {"tie_word_embeddings": True, **SLIDING}),
    "qwen2-layer-types": ("qwen2", {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 16}),
    "qwen3-yarn-mscale": (
        "qwen3",
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False, "beta_fast": 16.0}},
    ),
    "qwen3-sliding": ("qwen3", SLIDING),
}


@pytest.fixture(params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch, overrides = VARIANTS[request.param]
    return tiny_checkpoint(tmp_path_factory.getbasetemp(), arch, **overrides)


def test_prefill_chunks_and_decodes_equal_transformers(checkpoint: Path) -> None:
    check_prompt_chunks_and_decodes(checkpoint)


def test_packed_sequences_equal_each_alone(checkpoint: Path) -> None:
    check_packed_as_alone(checkpoint)


@pytest.mark.parametrize("variant", ["llama", "mistral-sliding", "qwen2", "qwen3"])
@torch.inference_mode()
def test_greedy_tokens_equal_transformers(variant: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    arch, overrides = VARIANTS[variant]
    checkpoint = tiny_checkpoint(tmp_path_factory.getbasetemp(), arch, **overrides)
    ids = prompt(9)
    generated = oracle(checkpoint).generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, 9), max_new_tokens=20, do_sample=False, eos_token_id=-1
    )
    assert PackedRunner(load_tiny(checkpoint)).greedy("s", ids, 20) == generated[0, 9:].tolist()


@pytest.mark.parametrize("variant", ["llama-tied", "mistral-sliding", "qwen2", "qwen3"])
@torch.inference_mode()
def test_bfloat16_is_close_to_float32(variant: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    arch, overrides = VARIANTS[variant]
    checkpoint = tiny_checkpoint(tmp_path_factory.getbasetemp(), arch, **overrides)
    ids = prompt(23)
    exact = PackedRunner(load_tiny(checkpoint)).step([Chunk("s", ids)])[0]
    model = load_tiny(checkpoint, dtype="bfloat16")
    assert model.dtype is torch.bfloat16
    rounded = PackedRunner(model).step([Chunk("s", ids)])[0]
    assert rounded.dtype is torch.float32
    theirs = oracle(checkpoint, torch.bfloat16)(torch.tensor([ids])).logits[0].float()
    error, their_error = (rounded - exact).abs().mean(), (theirs - exact).abs().mean()
    assert error < 1.5 * their_error + 1e-3, f"{error} against transformers' own {their_error}"


@torch.inference_mode()
def test_head_of_no_rows_is_empty(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = load_tiny(tiny_checkpoint(tmp_path_factory.getbasetemp(), "llama"))
    from loraplex_kernels.lora.reference import ReferenceLora
    from loraplex_kernels.segments import SegmentPlan

    logits = model.head(torch.empty(0, model.hidden_size), ReferenceLora().prepare(SegmentPlan(0, ())))
    assert logits.shape == (0, model.vocab_size)


def test_model_says_what_it_is(tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = tiny_checkpoint(tmp_path_factory.getbasetemp(), "qwen3")
    model = load_tiny(checkpoint)
    assert (model.architecture, model.vocab_size, model.hidden_size) == ("Qwen3ForCausalLM", 96, 32)
    assert model.max_position == 256
    kv = model.kv_spec()
    assert (kv.num_layers, kv.kv_heads, kv.head_dim) == (2, 2, 8)
    assert list(model.tables()) == [site.name for site in model.sites()]
    parameters = sum(parameter.numel() for parameter in oracle(checkpoint).parameters())
    assert 4 * parameters <= model.weight_bytes < 6 * parameters  # packing pads small matrices
