"""Which text files an export has: the adapter's over the base's, file by file, so that it answers as it is served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraplex.adapters.delta import AdapterDelta
from loraplex.adapters.exporting.text_files import base_text_of, laid_over_base, text_of
from loraplex.adapters.reading.source import any_directory
from loraplex.errors import InvalidAdapter
from loraplex.text.pack import AdapterText, TextPack
from loraplex.types import Coverage, OwnText


def delta(eos: tuple[int, ...] | None = None) -> AdapterDelta:
    text = None if eos is None else AdapterText(OwnText("d", eos_token_ids=eos), TextPack())
    return AdapterDelta("uid", "lora", {}, Coverage({}, {}), text=text)


def text(value: object) -> bytes:
    return json.dumps(value).encode()


def test_files_are_those_of_the_directory_and_no_others(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "merges.txt", "adapter_config.json", "training_args.bin", "README.md"):
        (tmp_path / name).write_text(name)
    expected = {"tokenizer.json": b"tokenizer.json", "merges.txt": b"merges.txt"}
    assert text_of(any_directory(str(tmp_path))) == base_text_of(tmp_path) == expected
    assert base_text_of(tmp_path / "model.gguf") == {}
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(InvalidAdapter, match=r"tokenizer\.json: not a regular file"):
        text_of(any_directory(str(tmp_path)))


def test_an_adapters_file_stands_for_the_bases() -> None:
    base = {"tokenizer.json": b"base", "chat_template.jinja": b"base", "special_tokens_map.json": b"base"}
    own = {"tokenizer.json": b"own"}
    assert laid_over_base(own, base, delta()) == {**base, **own}
    assert laid_over_base({}, base, delta()) == base


@pytest.mark.parametrize("own_config", [{}, {"chat_template": "own"}])
def test_the_bases_template_stays_where_the_adapter_ships_a_config_without_one(own_config: dict[str, str]) -> None:
    base = {"tokenizer_config.json": text({"chat_template": "base"})}
    files = laid_over_base({"tokenizer_config.json": text(own_config)}, base, delta())
    assert files.get("chat_template.jinja") == (None if own_config else b"base")


def test_generation_settings_are_the_adapters_with_the_bases_tokens() -> None:
    base = {"generation_config.json": text({"eos_token_id": 2, "pad_token_id": 0, "temperature": 0.3})}
    own = {"generation_config.json": text({"top_p": 0.5, "eos_token_id": None})}

    def found(own: dict[str, bytes], eos: tuple[int, ...] | None = None) -> object:
        files = laid_over_base(own, base, delta(eos))
        return json.loads(files["generation_config.json"])

    assert found(own) == {"eos_token_id": 2, "pad_token_id": 0, "top_p": 0.5}
    assert found({}) == {"eos_token_id": 2, "pad_token_id": 0, "temperature": 0.3}
    assert found({}, eos=(7, 8)) == {"eos_token_id": [7, 8], "pad_token_id": 0, "temperature": 0.3}
    assert "generation_config.json" not in laid_over_base({}, {}, delta())
    assert json.loads(laid_over_base({}, {}, delta((5,)))["generation_config.json"]) == {"eos_token_id": [5]}
