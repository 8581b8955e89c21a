"""GGUF files, by the library itself; it has no quantizer for K-quants, whose blocks are drawn here."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

#: a weight's name in the checkpoint -> its type in the file; None: float32
Choose = Callable[[str], Kind | None]

#: standard deviation of drawn weights, as of the checkpoints that the others are made from
_SIZE = 0.05
CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
_ENDS = ("model.embed_tokens.weight", "lm_head.weight")


def in_blocks(kind: Kind, *, ends: Kind | None = None) -> Callable[[Path, Path], None]:
    """Writes a dense checkpoint with its linear modules in ``kind``, embedding and head in ``ends``."""
    return lambda dense, out: _write(dense, out, lambda name: ends if name in _ENDS else kind)


def in_k_quants(dense: Path, out: Path) -> None:
    """As llama.cpp mixes Q4_K_M: values and down projections of the last layer, and the head, in Q6_K."""
    more = ("lm_head.weight", "model.layers.1.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight")
    _write(dense, out, lambda name: Kind.Q6_K if name in more else Kind.Q4_K)


def write_gguf(
    checkpoint: Path, path: Path, *, drop: str = "", choose: Choose = lambda name: None, text: bool = False
) -> Path:
    """The checkpoint as llama.cpp's converter writes it: q and k rows of llama interleaved. ``choose``: for matrices.
    ``text``: with a tokenizer of ``vocabulary()`` and a chat template."""
    config = json.loads((checkpoint / "config.json").read_text())
    arch = config["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if text:
        _add_text(writer)
    heads = _interleaved(arch, config["num_attention_heads"], config["num_key_value_heads"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        weight, module = tensor.float().numpy(), name.split(".")[-2]
        if module in heads:
            rows = weight.reshape(heads[module], 2, weight.shape[0] // heads[module] // 2, weight.shape[1])
            weight = rows.swapaxes(1, 2).reshape(weight.shape)
        kind = choose(name) if weight.ndim == 2 else None
        if name != drop:
            data = weight if kind is None else _quantized(weight, kind, name)
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary() -> list[str]:
    """Three special tokens, GPT-2's 256 byte symbols and one merge: every text can be encoded."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *symbols, "12"]


def dense_of_blocks(path: Path) -> dict[str, torch.Tensor]:
    """Quantized module -> its weight, as the gguf library dequantizes it, rows of q and k back in halves."""
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    heads, kv_heads, layers = (
        reader.fields[f"{arch}.{key}"].contents()
        for key in ("attention.head_count", "attention.head_count_kv", "block_count")
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], layers)
    inner = (f"model.layers.{layer}.{module}" for layer in range(layers) for module in _MODULES)
    modules = {f"{names.get_name(module)}.weight": module for module in ("model.embed_tokens", "lm_head", *inner)}
    found = {}
    for tensor in reader.tensors:
        if tensor.tensor_type in (Kind.F32, Kind.F16, Kind.BF16):
            continue
        module = modules[tensor.name]
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        interleaved = _interleaved(arch, heads, kv_heads).get(module.split(".")[-1])
        if interleaved is not None:
            weight = weight.reshape(interleaved, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        found[module] = torch.from_numpy(weight.copy())
    return found


_MODULES = (*(f"self_attn.{one}_proj" for one in "qkvo"), *(f"mlp.{one}_proj" for one in ("gate", "up", "down")))


def _add_text(writer: gguf.GGUFWriter) -> None:
    tokens = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def _interleaved(arch: str, heads: int, kv_heads: int) -> dict[str, int]:
    """Modules whose rows llama.cpp's converter interleaves -> their heads."""
    return {"q_proj": heads, "k_proj": kv_heads} if arch == "llama" else {}


def _write(dense: Path, out: Path, choose: Choose) -> None:
    write_gguf(dense, out, choose=choose)


def _quantized(weight: np.ndarray, kind: Kind, name: str) -> np.ndarray:
    draw = {Kind.Q4_K: _q4_k, Kind.Q6_K: _q6_k}.get(kind)
    if draw is None:
        return gguf.quants.quantize(weight, kind)
    return draw(np.random.default_rng(zlib.crc32(name.encode())), weight.size // 256).reshape(len(weight), -1)


def _q4_k(generator: np.random.Generator, blocks: int) -> np.ndarray:
    """Any bytes for scales, mins and codes; d and dmin such that weights are about zero in the mean."""
    d = (generator.uniform(0.5, 1.5, (blocks, 1)) * _SIZE / 300).astype(np.float32)
    outer = np.concatenate((d, 7.5 * d), 1).astype(np.float16).view(np.uint8)
    return np.concatenate((outer, generator.integers(0, 256, (blocks, 140), np.uint8)), 1)


def _q6_k(generator: np.random.Generator, blocks: int) -> np.ndarray:
    """Any bytes for codes and scales, those negative ones too."""
    d = (generator.uniform(0.5, 1.5, (blocks, 1)) * _SIZE / 1400).astype(np.float16).view(np.uint8)
    return np.concatenate((generator.integers(0, 256, (blocks, 208), np.uint8), d), 1)
