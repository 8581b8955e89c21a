"""A GGUF file by the command line: its own blocks, and the text that comes with it, without converting weights."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind

from loraplex.cli import main
from loraplex.commands.base_model import find_base_model
from loraplex.config import ModelConfig, default_cache_dir
from loraplex.demo.base import demo_gguf
from loraplex.demo.gallery import ADAPTERS_DIR
from loraplex.errors import NotFound
from loraplex.models.loader import plan_model
from loraplex_client import Client, Message, Params
from tests.quant.packers.gguf import vocabulary, write_gguf
from tests.servers import serve
from tests.small_lora import write_adapter
from tests.tiny import load_tiny, tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one that the file is made from."""
    sizes = {"vocab_size": len(vocabulary()), "intermediate_size": 64, "tie_word_embeddings": True}
    return tiny_checkpoint(tmp_path_factory.mktemp("base"), "llama", **sizes)


@pytest.fixture(scope="module")
def file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(
        checkpoint, tmp_path_factory.mktemp("gguf") / "tiny.gguf", choose=lambda name: Kind.Q8_0, text=True
    )


def find(model: str, cache: Path) -> Path:
    config = ModelConfig(model=model, load_format="gguf")
    return find_base_model(config, cache, lambda *_: None).path


def test_a_file_is_served_with_its_text(
    checkpoint: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path / "cache"))
    adapter = write_adapter(tmp_path / "fr", checkpoint, rank=4)
    flags = ["--load-format", "gguf", "--adapter", f"fr={adapter}"]
    with serve(file, tmp_path / "log", *flags) as server, Client(server.address) as client:
        model = client.model()
        assert model.quantization == "gguf-q8_0"
        assert model.weight_bytes == load_tiny(file).weight_bytes
        params = Params(max_tokens=8, token_ids=True)
        said = client.generate([Message("user", "a 12")], params, adapters="fr")
        assert len(said.token_ids) == 8 or said.finish_reason == "stop"
        assert said.text
    (directory,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert (directory / "model.gguf").resolve() == file.resolve()
    assert not list(directory.glob("*.safetensors"))


def test_lint_takes_the_same_file(
    checkpoint: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path / "cache"))
    adapter = write_adapter(tmp_path / "fr", checkpoint, rank=4)
    for probe in ([], ["--no-probe"]):
        assert main(["lint", str(adapter), "--model", str(file), "--load-format", "gguf", *probe]) == 0
        assert "loads on tiny" in capsys.readouterr().out


def test_another_file_at_the_same_place_is_linked_anew(file: Path, tmp_path: Path) -> None:
    moved = tmp_path / "m.gguf"
    shutil.copy(file, moved)
    first = find(str(moved), tmp_path / "cache")
    assert find(str(moved), tmp_path / "cache") == first
    moved.write_bytes(file.read_bytes() + b"\0" * 32)
    assert find(str(moved), tmp_path / "cache") != first


def test_a_file_without_text_is_served_by_token_ids(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = write_gguf(checkpoint, tmp_path / "bare.gguf")
    assert find(str(bare), tmp_path / "cache") == bare
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(f"{bare} is served without its tokenizer, by token ids alone")
    assert "tokenizer.ggml.pre" in warning


def test_the_demo_is_the_file_that_its_package_ships() -> None:
    try:
        shipped = demo_gguf()
    except NotFound as error:
        pytest.skip(f"the demo base is missing: {error}")
    config = ModelConfig(model="demo", load_format="gguf", device="cpu")
    base = find_base_model(config, default_cache_dir(), lambda *_: None)
    assert base.adapter_dirs == (str(ADAPTERS_DIR),)
    assert (base.path / "model.gguf").resolve() == shipped.resolve()
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {
        path.name for path in base.path.iterdir()
    }
    plan = plan_model(base.path, config)
    assert plan.format.name == "gguf-q4_1"
    matrices = plan.spec.matrices()
    assert plan.format.nbytes(matrices[plan.spec.names.embed]) == 49152 * 576 // 32 * 34
    inner = sum(plan.format.nbytes(matrix) or 0 for matrix in matrices.values() if not matrix.end)
    assert inner == sum(one.out_features * one.in_features for one in matrices.values() if not one.end) * 5 // 8
