"""`convert_gguf` on a tiny random llama written here, against the same weights in transformers."""

from __future__ import annotations

import resource
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from loraplex.errors import ConversionFailed, NotFound
from loraplex.models.gguf_convert import convert_gguf
from tests.quant.packers.gguf import CHAT_TEMPLATE, vocabulary

_NUM_HEADS, _NUM_KV_HEADS, _HIDDEN, _NUM_LAYERS = 4, 2, 32, 2
_BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_OTHER_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def _reference(config_class: type[PreTrainedConfig] = LlamaConfig, tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_class(
        hidden_size=_HIDDEN,
        intermediate_size=48,
        num_hidden_layers=_NUM_LAYERS,
        num_attention_heads=_NUM_HEADS,
        num_key_value_heads=_NUM_KV_HEADS,
        head_dim=_HIDDEN // _NUM_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        vocab_size=len(vocabulary()),
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((torch.randn_like(weight) * 0.3).bfloat16())
    return model


def _interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's `permute`: what its own converter does to q and k."""
    rows = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def _tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The weights as llama.cpp's converter names and lays them out: only `llama` rows are permuted."""
    num_heads = {"attn_q": _NUM_HEADS, "attn_k": _NUM_KV_HEADS} if model.config.model_type == "llama" else {}
    tensors = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        module, kind = name.removeprefix("model.").rsplit(".", 1)
        parts = module.split(".")
        if parts[0] != "layers":
            tensors[f"{_OTHER_NAMES[module]}.{kind}"] = weight
            continue
        block_name = _BLOCK_NAMES[".".join(parts[2:])]
        if block_name in num_heads:
            weight = _interleaved(weight, num_heads[block_name])
        tensors[f"blk.{parts[1]}.{block_name}.{kind}"] = weight
    return tensors


def _write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    architecture: str = "llama",
    pre: str = "smollm",
    tokenizer_model: str = "gpt2",
    add_bos: bool | None = False,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(_HIDDEN)
    writer.add_block_count(_NUM_LAYERS)
    writer.add_feed_forward_length(48)
    writer.add_head_count(_NUM_HEADS)
    writer.add_head_count_kv(_NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    tokens = vocabulary()
    writer.add_tokenizer_model(tokenizer_model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "config_class", "tied"),
    [
        ("llama", LlamaConfig, True),
        ("llama", LlamaConfig, False),
        ("qwen2", Qwen2Config, True),
        ("qwen3", Qwen3Config, False),
    ],
)
def test_logits_equal_the_source_weights(
    tmp_path: Path, architecture: str, config_class: type[PreTrainedConfig], tied: bool
) -> None:
    reference = _reference(config_class, tied)
    gguf_path = _write_gguf(tmp_path / "tiny.gguf", _tensors(reference), architecture, pre="qwen2")
    converted = AutoModelForCausalLM.from_pretrained(convert_gguf(gguf_path, tmp_path / "out"), dtype=torch.float32)
    token_ids = torch.arange(3, 40).unsqueeze(0)  # [1, T]
    assert torch.equal(converted(token_ids).logits, reference(token_ids).logits)
    assert converted.config.rms_norm_eps == 1e-5
    assert converted.config.tie_word_embeddings is tied


@pytest.mark.parametrize(("pre", "digits"), [("smollm", ["1", "2"]), ("qwen2", ["1", "2"]), ("llama-bpe", ["12"])])
def test_tokenizer_splits_as_the_file_says(tmp_path: Path, pre: str, digits: list[str]) -> None:
    gguf_path = _write_gguf(tmp_path / "tiny.gguf", _tensors(_reference()), pre=pre)
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(gguf_path, tmp_path / "out"))
    assert tokenizer("a 12").tokens() == ["a", "Ġ", *digits]
    assert tokenizer.decode(tokenizer("it's 12 é").input_ids) == "it's 12 é"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], return_dict=False)
    assert tokenizer.convert_ids_to_tokens(chat) == ["<|im_start|>", "a", "<|im_end|>"]
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", 64)


@pytest.mark.parametrize(
    ("pre", "add_bos", "first"),
    [
        ("smollm", False, "a"),
        ("smollm", True, "<|im_start|>"),
        ("smollm", None, "a"),
        ("llama-bpe", None, "<|im_start|>"),
    ],
)
def test_tokenizer_opens_with_bos_where_the_file_says_so(
    tmp_path: Path, pre: str, add_bos: bool | None, first: str
) -> None:
    gguf_path = _write_gguf(tmp_path / "tiny.gguf", _tensors(_reference()), pre=pre, add_bos=add_bos)
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(gguf_path, tmp_path / "out"))
    assert tokenizer("a").tokens()[0] == first
    assert tokenizer("a", add_special_tokens=False).tokens() == ["a"]


def test_progress_counts_every_tensor(tmp_path: Path) -> None:
    tensors = _tensors(_reference())
    seen: list[tuple[int, int]] = []
    gguf_path = _write_gguf(tmp_path / "tiny.gguf", tensors)
    convert_gguf(gguf_path, tmp_path / "out", lambda num_done, num_total: seen.append((num_done, num_total)))
    assert seen == [(num_done, len(tensors)) for num_done in range(len(tensors) + 1)]


def test_an_interrupted_conversion_leaves_nothing_and_the_next_succeeds(tmp_path: Path) -> None:
    gguf_path = _write_gguf(tmp_path / "tiny.gguf", _tensors(_reference()))
    out_dir = tmp_path / "cache" / "out"

    def disk_full(num_done: int, num_total: int) -> None:
        if num_done == 3:
            raise OSError(28, "No space left on device")

    with pytest.raises(ConversionFailed, match="No space left"):
        convert_gguf(gguf_path, out_dir, disk_full)
    assert not [path for path in out_dir.parent.iterdir() if path.is_dir()]

    (out_dir.parent / "out.partial").mkdir()  # what a killed process leaves
    assert (convert_gguf(gguf_path, out_dir) / "model.safetensors").is_file()
    assert not (out_dir.parent / "out.partial").exists()


@pytest.mark.parametrize("max_file_bytes", [200, 2_000, 20_000], ids=["config", "tokenizer", "weights"])
def test_a_write_that_the_disk_refuses_is_an_error_and_leaves_nothing(tmp_path: Path, max_file_bytes: int) -> None:
    gguf_path = _write_gguf(tmp_path / "tiny.gguf", _tensors(_reference()))
    out_dir = tmp_path / "cache" / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, hard))
    try:
        with pytest.raises(ConversionFailed, match="File too large"):
            convert_gguf(gguf_path, out_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in out_dir.parent.iterdir() if path.is_dir()]
    assert (convert_gguf(gguf_path, out_dir) / "model.safetensors").is_file()


def test_an_existing_directory_is_not_touched(tmp_path: Path) -> None:
    gguf_path = _write_gguf(tmp_path / "tiny.gguf", _tensors(_reference()))
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    assert convert_gguf(gguf_path, out_dir) == out_dir
    assert not list(out_dir.iterdir())


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "token_embd.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    tensors = _tensors(_reference())
    del tensors[name]
    with pytest.raises(ConversionFailed, match=f"tensor '{name}' is missing"):
        convert_gguf(_write_gguf(tmp_path / "tiny.gguf", tensors), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.9.attn_q.weight", "rope_freqs.weight"])
def test_an_unknown_tensor_is_named(tmp_path: Path, name: str) -> None:
    tensors = _tensors(_reference()) | {name: np.zeros(_HIDDEN, dtype=np.float32)}
    with pytest.raises(ConversionFailed, match=f"tensor '{name}' has no place in LlamaForCausalLM"):
        convert_gguf(_write_gguf(tmp_path / "tiny.gguf", tensors), tmp_path / "out")


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    tensors = _tensors(_reference())
    tensors["blk.0.attn_k.weight"] = np.zeros((3, _HIDDEN), dtype=np.float32)
    with pytest.raises(ConversionFailed, match=r"'blk.0.attn_k.weight' has shape \[3, 32\], expected \[16, 32\]"):
        convert_gguf(_write_gguf(tmp_path / "tiny.gguf", tensors), tmp_path / "out")


def test_unknown_architecture_and_tokenizer_are_named(tmp_path: Path) -> None:
    tensors = _tensors(_reference())
    with pytest.raises(ConversionFailed, match="architecture 'mamba' is unknown; known are llama"):
        convert_gguf(_write_gguf(tmp_path / "m.gguf", tensors, architecture="mamba"), tmp_path / "m")
    with pytest.raises(ConversionFailed, match="pre-tokenizer 'klingon' is unknown; known are gpt-2"):
        convert_gguf(_write_gguf(tmp_path / "k.gguf", tensors, pre="klingon"), tmp_path / "k")
    with pytest.raises(ConversionFailed, match="model is 'llama'; only 'gpt2'"):
        convert_gguf(_write_gguf(tmp_path / "s.gguf", tensors, tokenizer_model="llama"), tmp_path / "s")


def test_a_missing_file_and_a_file_that_is_not_gguf_are_errors(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"none.gguf' does not exist"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "out")
    text = tmp_path / "text.gguf"
    text.write_bytes(b"this is not a model, it is a sentence")
    with pytest.raises(ConversionFailed, match="not a readable GGUF file"):
        convert_gguf(text, tmp_path / "out")


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99])
def test_a_truncated_file_is_an_error(tmp_path: Path, kept: float) -> None:
    whole = _write_gguf(tmp_path / "whole.gguf", _tensors(_reference())).read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ConversionFailed, match="not a readable GGUF file"):
        convert_gguf(cut, tmp_path / "out")
