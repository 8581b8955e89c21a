"""A GGUF file read directly equals the checkpoint it was made from; names come from the gguf library's own map."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from loraplex.errors import InvalidModel, NotFound
from tests.quant.packers.gguf import write_gguf
from tests.tiny import Chunk, PackedRunner, load_tiny, prompt, tiny_checkpoint


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


@pytest.mark.parametrize("quantization", ["", "none"])
def test_quantized_tensors_come_close(
    quantization: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint = tiny_checkpoint(tmp_path_factory.getbasetemp(), "llama", tie_word_embeddings=True)
    # rows of 48 columns have no blocks
    file = write_gguf(checkpoint, tmp_path / "q8.gguf", choose=lambda name: None if "down_proj" in name else Kind.Q8_0)
    ids = prompt(9)
    exact = PackedRunner(load_tiny(checkpoint)).step([Chunk("s", ids)])[0]
    rounded = PackedRunner(load_tiny(file, quantization=quantization)).step([Chunk("s", ids)])[0]
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
    spoiled = write_gguf(checkpoint, tmp_path / "type.gguf", choose=lambda name: Kind.Q8_0 if "embed" in name else None)
    name = b"token_embd.weight"
    raw = bytearray(spoiled.read_bytes())
    at = raw.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions, and two of them
    assert raw[at : at + 4] == Kind.Q8_0.to_bytes(4, "little")
    raw[at : at + 4] = (99).to_bytes(4, "little")
    spoiled.write_bytes(raw)
    with pytest.raises(InvalidModel, match=r"type\.gguf.*99\)? is not a valid GGMLQuantizationType"):
        load_tiny(spoiled)
