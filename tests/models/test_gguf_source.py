"""A GGUF file read directly equals the checkpoint it was made from; names come from the gguf library's own map."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loraplex.errors import InvalidModel, NotFound
from tests.tiny import Chunk, PackedRunner, load_tiny, prompt, tiny_checkpoint


def write_gguf(checkpoint: Path, path: Path, drop: str = "") -> Path:
    """The checkpoint as llama.cpp's converter writes it: q and k rows of llama interleaved."""
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
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        weight, module = tensor.float().numpy(), name.split(".")[-2]
        if arch == "llama" and module in heads:
            rows = weight.reshape(heads[module], 2, weight.shape[0] // heads[module] // 2, weight.shape[1])
            weight = rows.swapaxes(1, 2).reshape(weight.shape)
        if name != drop:
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [("llama", {"tie_word_embeddings": True}), ("llama", {}), ("qwen2", {}), ("qwen3", {})],
    ids=["llama-tied", "llama", "qwen2", "qwen3"],
)
@torch.inference_mode()
def test_gguf_equals_its_checkpoint(
    arch: str, overrides: dict[str, object], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint = tiny_checkpoint(tmp_path_factory.getbasetemp(), arch, **overrides)
    file = write_gguf(checkpoint, tmp_path / "model.gguf")
    expected = PackedRunner(load_tiny(checkpoint)).step([Chunk("s", prompt(9))])[0]
    for model in (load_tiny(file), load_tiny(tmp_path, load_format="gguf")):
        assert torch.equal(PackedRunner(model).step([Chunk("s", prompt(9))])[0], expected)
        assert model.sites() == load_tiny(checkpoint).sites()


def test_quantized_tensors_are_dequantized(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = tiny_checkpoint(tmp_path_factory.getbasetemp(), "llama", tie_word_embeddings=True)
    whole = gguf.GGUFReader(write_gguf(checkpoint, tmp_path / "whole.gguf"))
    writer = gguf.GGUFWriter(tmp_path / "q8.gguf", "llama")
    for key, field in whole.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in whole.tensors:
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.data.ndim == 2 and tensor.data.shape[1] % 32 == 0 else None
        data = np.array(tensor.data)
        writer.add_tensor(tensor.name, data if kind is None else gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = prompt(9)
    exact = PackedRunner(load_tiny(checkpoint)).step([Chunk("s", ids)])[0]
    rounded = PackedRunner(load_tiny(tmp_path / "q8.gguf")).step([Chunk("s", ids)])[0]
    assert 0 < (rounded - exact).abs().max() < 0.2 < exact.abs().max()


def test_wrong_files_are_named(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = tiny_checkpoint(tmp_path_factory.getbasetemp(), "llama")
    with pytest.raises(NotFound, match=r"absent\.gguf"):
        load_tiny(tmp_path / "absent.gguf")
    with pytest.raises(InvalidModel, match="holds none"):
        load_tiny(tmp_path, load_format="gguf")
    (tmp_path / "text.gguf").write_text("this is no model")
    with pytest.raises(InvalidModel, match=r"text\.gguf"):
        load_tiny(tmp_path / "text.gguf")
    file = write_gguf(checkpoint, tmp_path / "short.gguf", drop="model.norm.weight")
    with pytest.raises(InvalidModel, match=r"'output_norm\.weight' is missing"):
        load_tiny(file)
    whole = write_gguf(checkpoint, tmp_path / "cut.gguf")
    whole.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(InvalidModel, match=r"cut\.gguf"):
        load_tiny(whole)
