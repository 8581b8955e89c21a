"""What makes two adapters the same one: all that is served of them, and nothing else."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from bench.merging.peak import peak_of
from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta
from loraplex.adapters.load import load_adapter
from loraplex.adapters.reading.source import any_directory
from loraplex.adapters.text.base_text import BaseText
from loraplex.adapters.text.own_text import OwnTexts
from loraplex.adapters.uid import uid_of
from loraplex.errors import InvalidAdapter, Mismatch
from tests.fakes_adapters import save_peft, tiny_llama, view_of, write_adapter
from tests.own_text import VOCAB_SIZE, chat_base, own_template, ship_tokenizer


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


def load(path: Path, base: BaseView) -> AdapterDelta:
    return load_adapter(any_directory(str(path)), base, max_bytes=1 << 24)


def test_uid_is_the_content(tmp_path: Path, model: LlamaForCausalLM) -> None:
    save_peft(copy.deepcopy(model), tmp_path / "a", target_modules=["q_proj"])
    save_peft(copy.deepcopy(model), tmp_path / "b", target_modules=["q_proj"])
    base = view_of(model)
    first = load(tmp_path / "a", base).uid
    assert len(first) == 32
    assert load(tmp_path / "b", base).uid != first
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    tensors = (tmp_path / "a/adapter_model.safetensors").read_bytes()
    write_adapter(tmp_path / "c", dict(reversed(config.items())), tensors)
    assert load(tmp_path / "c", base).uid == first
    write_adapter(tmp_path / "d", config | {"lora_alpha": 99}, tensors)
    assert load(tmp_path / "d", base).uid != first


def test_the_order_of_patterns_is_content(tmp_path: Path, model: LlamaForCausalLM) -> None:
    """Of patterns the first that matches counts, so that the same ones in another order are another adapter."""
    patterns = {"q_proj": 3.0, ".*_proj": 16.0}
    save_peft(copy.deepcopy(model), tmp_path / "a", target_modules=["q_proj"])
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    tensors = (tmp_path / "a/adapter_model.safetensors").read_bytes()
    deltas = []
    for name, order in (("b", patterns), ("c", dict(reversed(patterns.items())))):
        write_adapter(tmp_path / name, config | {"alpha_pattern": order}, tensors)
        deltas.append(load(tmp_path / name, view_of(model)))
    scales = [delta.sites["model.layers.0.self_attn.q_proj"].low_rank.scale * config["r"] for delta in deltas]
    assert scales == [3.0, 16.0]
    assert deltas[0].uid != deltas[1].uid


def test_the_uid_is_found_without_a_load(tmp_path: Path, model: LlamaForCausalLM) -> None:
    """As the load finds it, of all that counts: the config's order does not, text of its own does."""
    base, path = view_of(model), tmp_path / "a"
    save_peft(copy.deepcopy(model), path, target_modules=["q_proj"])
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(dict(reversed(config.items()))))
    text_base = chat_base(tmp_path)
    texts = OwnTexts(BaseText.read(text_base, (2,)), allow_templates=True)
    ship_tokenizer(text_base, path, [], special=[], template=own_template("~"), eos_token="<eos>")
    found = {
        read: (load_adapter(any_directory(str(path)), base, max_bytes=1 << 24, texts=read).uid, quick(path, read))
        for read in (None, texts)
    }
    assert all(loaded == alone for loaded, alone in found.values())
    assert found[None] != found[texts]


def test_tokens_that_an_adapter_adds_have_a_part_in_its_uid(tmp_path: Path, model: LlamaForCausalLM) -> None:
    """However many there are: whether it has embeddings of them is asked by the load, which had none against it."""
    path, text_base = tmp_path / "a", chat_base(tmp_path)
    save_peft(copy.deepcopy(model), path, target_modules=["q_proj"])
    texts = OwnTexts(BaseText.read(text_base, (2,)), allow_templates=True)
    ship_tokenizer(text_base, path, [f"<added-{number}>" for number in range(VOCAB_SIZE)])
    with pytest.raises(Mismatch, match="past the vocabulary"):
        texts.read(any_directory(str(path)), VOCAB_SIZE)
    assert quick(path, texts) != quick(path)


def quick(path: Path, texts: OwnTexts | None = None) -> str:
    return uid_of(any_directory(str(path)), texts, frozenset(), lambda: None)


def test_the_uid_of_a_large_file_takes_no_memory(tmp_path: Path, model: LlamaForCausalLM) -> None:
    path = tmp_path / "a"
    save_peft(copy.deepcopy(model), path, target_modules=["q_proj"])
    before = quick(path)
    with (path / "adapter_model.safetensors").open("ab") as file:
        file.write(bytes(32 << 20))
    uid, peak = peak_of(lambda: quick(path))
    assert uid != before
    assert peak.total < 4 << 20


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_missing_has_no_uid(tmp_path: Path, model: LlamaForCausalLM, name: str) -> None:
    save_peft(copy.deepcopy(model), tmp_path / "a", target_modules=["q_proj"])
    (tmp_path / "a" / name).unlink()
    with pytest.raises(InvalidAdapter, match=name):
        quick(tmp_path / "a")
