"""State-space and hybrid families against transformers in float32: prompts, chunks, decodes, packed batches, ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from loraplex.config import ModelConfig
from loraplex.models.loader import plan_model
from loraplex_kernels.states import StatePool
from tests.held import held_bytes
from tests.models.family_checks import TOLERANCE, check_packed_as_alone, check_prompt_chunks_and_decodes, on_ranks
from tests.tiny import Chunk, PackedRunner, load_tiny, oracle, prompt, tiny_checkpoint

INF = float("inf")
ROPE_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 0.5,
}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "mamba2": ("mamba2", {}),
    "mamba2-tied-one-group": ("mamba2", {"tie_word_embeddings": True, "n_groups": 1}),
    "mamba2-biases": ("mamba2", {"use_bias": True, "n_groups": 8}),
    "mamba2-no-conv-bias": ("mamba2", {"use_conv_bias": False, "conv_kernel": 2, "state_size": 12}),
    "mamba2-limits": ("mamba2", {"time_step_limit": (0.3, 0.9)}),
    "mamba2-wide-kernel": ("mamba2", {"conv_kernel": 7, "expand": 4, "num_heads": 16}),
    "bamba": ("bamba", {}),
    "bamba-biases": ("bamba", {"mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True}),
    "bamba-yarn": ("bamba", {"rope_parameters": ROPE_YARN, "attn_layer_indices": [0, 2], "head_dim": 8}),
    "bamba-tied": ("bamba", {"attn_layer_indices": [2], "tie_word_embeddings": True}),
    "falcon-h1": ("falcon_h1", {}),
    "falcon-h1-norm-first": ("falcon_h1", {"mamba_norm_before_gate": True, "mamba_n_groups": 4}),
    "falcon-h1-no-norm": ("falcon_h1", {"mamba_rms_norm": False, "projectors_bias": True}),
    "falcon-h1-wide": ("falcon_h1", {"mamba_d_ssm": None, "mamba_d_head": "auto", "mamba_proj_bias": True}),
    "nemotron-h": ("nemotron_h", {}),
    "nemotron-h-mlp-bias": ("nemotron_h", {"mlp_bias": True, "use_bias": True, "mamba_num_heads": 4}),
    "granite": ("granitemoehybrid", {}),
    "granite-rope": ("granitemoehybrid", {"position_embedding_type": "rope", "attention_bias": True}),
}
#: each family, and every relation of groups to ranks
RANKED: dict[str, tuple[str, dict[str, object]]] = {
    "mamba2-1-group": ("mamba2", {"n_groups": 1}),
    "mamba2-2-groups": ("mamba2", {"n_groups": 2, "use_bias": True}),
    "mamba2-8-groups": ("mamba2", {"n_groups": 8, "tie_word_embeddings": True}),
    "mamba2-6-groups-of-12-heads": ("mamba2", {"n_groups": 6, "num_heads": 12, "hidden_size": 48}),
    "bamba-1-group": ("bamba", {"mamba_n_groups": 1}),
    "falcon-h1-1-group": ("falcon_h1", {"mamba_n_groups": 1, "mamba_norm_before_gate": True}),
    "falcon-h1-no-norm": ("falcon_h1", {"mamba_rms_norm": False}),
    "nemotron-h-8-groups": ("nemotron_h", {"n_groups": 8}),
    "granite-2-groups": ("granitemoehybrid", {}),
}


@pytest.fixture(params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch, overrides = VARIANTS[request.param]
    return tiny_checkpoint(tmp_path_factory.getbasetemp(), arch, **overrides)


@torch.inference_mode()
def test_prompts_chunks_and_decodes_equal_transformers(checkpoint: Path) -> None:
    check_prompt_chunks_and_decodes(checkpoint)
    ids = prompt(9)
    assert PackedRunner(load_tiny(checkpoint)).greedy("answer", ids, 12) == _generated(oracle(checkpoint), ids, 12)


def test_packed_sequences_equal_each_alone(checkpoint: Path) -> None:
    check_packed_as_alone(checkpoint)


@pytest.mark.parametrize("variant", ["mamba2", "bamba", "falcon-h1", "nemotron-h", "granite"])
@torch.inference_mode()
def test_bfloat16_is_close_to_float32(variant: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    arch, overrides = VARIANTS[variant]
    checkpoint = tiny_checkpoint(tmp_path_factory.getbasetemp(), arch, **overrides)
    ids = prompt(23)
    exact = PackedRunner(load_tiny(checkpoint)).step([Chunk("s", ids)])[0]
    rounded = PackedRunner(load_tiny(checkpoint, dtype="bfloat16")).step([Chunk("s", ids)])[0]
    theirs = oracle(checkpoint, torch.bfloat16)(torch.tensor([ids])).logits[0].float()
    error, their_error = (rounded - exact).abs().mean(), (theirs - exact).abs().mean()
    assert error < 1.5 * their_error + 1e-3, f"{error} against transformers' own {their_error}"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("variant", RANKED)
def test_ranks_equal_one(variant: str, size: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    arch, overrides = RANKED[variant]
    checkpoint = tiny_checkpoint(tmp_path_factory.getbasetemp(), arch, **overrides)
    steps = (
        [Chunk("a", prompt(11)), Chunk("b", prompt(3, seed=1))],
        [Chunk("a", (7,)), Chunk("b", (9,)), Chunk("c", prompt(6, seed=2))],
    )
    alone = PackedRunner(load_tiny(checkpoint))
    expected = [torch.cat(alone.step(step)) for step in steps]
    for found in on_ranks(checkpoint, size, steps):
        for ours, one in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, one, **TOLERANCE)


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_its_part_of_states_and_weights(size: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = tiny_checkpoint(tmp_path_factory.getbasetemp(), "mamba2", n_groups=8)
    plan = plan_model(checkpoint, ModelConfig(model=str(checkpoint), device="cpu", dtype="float32"))
    whole, part = plan.spec.state_shape(), plan.spec.state_shape(size)
    assert whole is not None
    assert part is not None
    assert part.slot_bytes(torch.float32) * size == whole.slot_bytes(torch.float32)
    layers, channels, heads = 2, 64 + 2 * 8 * 16, 8
    formula = layers * (channels * 3 + heads * 8 * 16) * 4  # docs/STATES.md
    assert whole.slot_bytes(torch.float32) == formula
    assert held_bytes(StatePool(whole, 10, torch.float32, torch.device("cpu"))) == 10 * formula


def _generated(model: torch.nn.Module, ids: Sequence[int], count: int) -> list[int]:
    generated = model.generate(  # type: ignore[operator]
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
    )
    return list(generated[0, len(ids) :].tolist())
