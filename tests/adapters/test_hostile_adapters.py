"""Small files that would cost much: refused by name, at once, before anything is expanded, matched or computed."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig
from transformers import PreTrainedModel

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.load import load_adapter
from loraplex.adapters.reading.source import AdapterSources, any_directory
from loraplex.errors import InvalidAdapter, InvalidRequest, LoraplexError, Mismatch, OverCapacity, UnsupportedFeature
from tests.adapters.peft_sites import files_of, load, lora_config, save_adapter
from tests.fakes_adapters import framed, view_of, write_adapter
from tests.tiny import tiny_model

EMBEDDING = "base_model.model.model.embed_tokens"
#: the most that reading one of these may take
SOON_S = 3.0


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def base(model: PreTrainedModel) -> BaseView:
    return view_of(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, model: PreTrainedModel) -> dict[str, Path]:
    """Good adapters, by kind."""
    configs: dict[str, peft.PeftConfig] = {
        "lora": lora_config(target_modules=["q_proj"]),
        "alora": lora_config(target_modules=["q_proj"], alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM"),
        "bdlora": lora_config(
            target_modules=["q_proj"], r=8, use_bdlora=BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=8)
        ),
        "adalora": peft.AdaLoraConfig(total_step=10, init_r=4, target_modules=["q_proj"]),
        "head": lora_config(target_modules=["v_proj"], modules_to_save=["embed_tokens"]),
    }
    root = tmp_path_factory.mktemp("good")
    for kind, config in configs.items():
        save_adapter(model, root / kind, config)
    return {kind: root / kind for kind in configs}


def edited(good: Path, path: Path, **keys: Any) -> Path:
    config, tensors = files_of(good)
    return write_adapter(path, {**config, **keys}, tensors)


def refusal(path: Path, base: BaseView, error: type[LoraplexError], message: str) -> None:
    start = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        load(path, base)
    assert time.monotonic() - start < SOON_S
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("kind", "keys", "error", "message"),
    [
        ("adalora", {"lora_alpha": 10**400}, InvalidAdapter, "lora_alpha is 1000.*expected a finite number"),
        ("lora", {"layers_to_transform": list(range(5000))}, InvalidAdapter, "a list of at most 4096"),
        ("lora", {"revision": "\ud800"}, InvalidAdapter, "surrogates not allowed"),
        ("lora", {"\udfff": 1}, InvalidAdapter, "surrogates not allowed"),
        ("alora", {"alora_invocation_tokens": [5] * 257}, UnsupportedFeature, "257 tokens; at most 256 are served"),
        (
            "lora",
            {"target_modules": f"(({'|' * 1900}){{999}}){{999}}"},
            InvalidAdapter,
            "take too long to match",
        ),
    ],
)
def test_a_key(
    saved: dict[str, Path],
    base: BaseView,
    tmp_path: Path,
    kind: str,
    keys: dict[str, Any],
    error: type[LoraplexError],
    message: str,
) -> None:
    refusal(edited(saved[kind], tmp_path / "bad", **keys), base, error, message)


def test_nesting_of_every_depth(saved: dict[str, Path], base: BaseView, tmp_path: Path) -> None:
    """What can just be parsed must not be too deep to be hashed or shown; how deep that is depends on the stack."""
    config, tensors = files_of(saved["lora"])
    path = write_adapter(tmp_path / "deep", config, tensors)
    unexpected: list[tuple[int, Exception]] = []

    def sweep() -> None:
        for depth in (*range(95, 110), *range(940, 1000), 1500, 5000, 100_000):
            text = json.dumps({**config, "target_modules": 0}).replace(
                '"target_modules": 0', f'"target_modules": {"[" * depth}{"]" * depth}'
            )
            (path / "adapter_config.json").write_text(text)
            try:
                load(path, base)
            except InvalidAdapter:
                pass
            except Exception as error:
                unexpected.append((depth, error))

    thread = threading.Thread(target=sweep)  # as the loader's: with next to nothing on its stack
    thread.start()
    thread.join()
    assert not unexpected


def test_a_tensor_without_elements_of_a_size_that_overflows(
    saved: dict[str, Path], base: BaseView, tmp_path: Path
) -> None:
    config, _ = files_of(saved["lora"])
    header = {"x": {"dtype": "F32", "shape": [1 << 53, 1 << 53, 0], "data_offsets": [0, 0]}}
    path = write_adapter(tmp_path / "empty", config, framed(json.dumps(header).encode()))
    refusal(path, base, InvalidAdapter, "larger than any file")


def test_blocks_that_become_far_more_than_their_file(saved: dict[str, Path], base: BaseView, tmp_path: Path) -> None:
    """q_proj is 32 x 32 in both layers: A is 8 x 4 in the file and 8 x 32 behind it."""
    assert load(saved["bdlora"], base).nbytes == 2 * (8 * 32 + 32 * 8) * 4
    with pytest.raises(OverCapacity, match=r"takes 4096 bytes \(rank 8, 2 sites\); at most 4095 are allowed"):
        load_adapter(any_directory(str(saved["bdlora"])), base, max_bytes=4095)


@pytest.mark.parametrize("shape", [(4, 32), (96,), (96, 31), (97, 32)], ids=str)
def test_what_lies_behind_a_saved_module_is_of_its_shape(
    saved: dict[str, Path], base: BaseView, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    config, tensors = files_of(saved["head"])
    tensors[f"{EMBEDDING}.original_module.weight"] = torch.ones(shape)
    refusal(write_adapter(tmp_path / "bad", config, tensors), base, Mismatch, "model.embed_tokens")


@pytest.mark.parametrize("source", ["file://[", "http://[x", "file://a\u2100/b"])
def test_a_source_that_is_no_url(source: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a URL"):
        AdapterSources([]).resolve(source)
