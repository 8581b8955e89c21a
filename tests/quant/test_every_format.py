"""What holds for every format: the weights of its library, the tokens of a dense model of them, the bytes it says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.config import ModelConfig
from loraplex.engine.local import LocalEngine
from loraplex.errors import InvalidModel, UnsupportedFeature
from loraplex.models.base import BaseModel
from loraplex.models.decoder import Decoder
from loraplex.models.loader import ModelPlan, plan_model
from loraplex.models.sites import SiteKind
from tests.engines import local_engine, make_adapters, mixed_requests
from tests.quant.cases import CASES, dense_base, dequantized, quantized
from tests.ranks import ranked_engine
from tests.tiny import load_tiny

NAMES = tuple(CASES)
SHARED = [(name, size) for name in NAMES for size in CASES[name].ranks]
OPTIONS = {"max_num_batched_tokens": 64, "max_num_seqs": 12, "kv_cache_memory": 16 << 20}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quant")


def planned(path: Path, name: str) -> ModelPlan:
    config = ModelConfig(device="cpu", dtype="float32", quantization=CASES[name].quantization)
    return plan_model(path, config)


def load(path: Path, name: str) -> BaseModel:
    return load_tiny(path, quantization=CASES[name].quantization)


def linear_bytes(model: object) -> int:
    assert isinstance(model, Decoder)
    return sum(linear.weight.nbytes for layer in model._parts.layers for linear in layer.linears)


def num_weights(model: object) -> int:
    assert isinstance(model, Decoder)
    sizes = [linear.weight.shape for layer in model._parts.layers for linear in layer.linears]
    return sum(rows * columns for rows, columns in sizes)


def tokens(engine: LocalEngine, adapters: dict[str, Path]) -> list[list[int]]:
    """Of one batch in which every row has its own adapter, or none."""
    for name, path in adapters.items():
        engine.load_adapter(name, str(path))
    return [generation.token_ids for generation in engine.generate(mixed_requests(1))]


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_library_that_wrote_them(root: Path, name: str) -> None:
    model, expected = load(quantized(root, name), name), CASES[name].dense(quantized(root, name))
    assert len(expected) >= 14  # every linear module of two layers
    for module, weight in expected.items():
        assert torch.equal(model.dense_weight(module), weight), module


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_format(root: Path, name: str) -> None:
    plan, model = planned(quantized(root, name), name), load(quantized(root, name), name)
    held, weights = linear_bytes(model), num_weights(model)
    assert held == pytest.approx(weights * CASES[name].bits / 8, rel=0.03)
    inner = [matrix for matrix in plan.spec.matrices().values() if not matrix.end]
    assert sum(plan.format.nbytes(matrix) or 0 for matrix in inner) == pytest.approx(held, rel=0.03)


@pytest.mark.parametrize("name", [name for name in NAMES if not CASES[name].quantization])
def test_served_dense_it_is_the_dense_model(root: Path, name: str) -> None:
    config = ModelConfig(device="cpu", dtype="float32", quantization="none")
    plan = plan_model(quantized(root, name), config)
    assert plan.format.name == "none"
    assert {plan.format.nbytes(matrix) for matrix in plan.spec.matrices().values()} == {None}
    model, dense = load_tiny(quantized(root, name), quantization="none"), load_tiny(dequantized(root, name))
    for module in plan.spec.matrices():
        assert torch.equal(model.dense_weight(module), dense.dense_weight(module)), module
    assert linear_bytes(model) == linear_bytes(dense)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_dense_model_with_adapters_in_one_batch(root: Path, name: str) -> None:
    adapters = make_adapters(dense_base(root), root / "adapters")
    options = {"adapter_dirs": (root / "adapters",), **OPTIONS}
    expected = tokens(local_engine(dequantized(root, name), **options), adapters)
    options["quantization"] = CASES[name].quantization
    assert tokens(local_engine(quantized(root, name), **options), adapters) == expected


@pytest.mark.parametrize(("name", "size"), SHARED)
def test_ranks_hold_their_parts_and_give_the_tokens_of_one(root: Path, name: str, size: int) -> None:
    adapters = make_adapters(dense_base(root), root / "adapters")
    options = {"adapter_dirs": (root / "adapters",), "quantization": CASES[name].quantization, **OPTIONS}
    alone = local_engine(quantized(root, name), **options)
    whole = alone.core._steps.executor.runner.model
    with ranked_engine(quantized(root, name), size, **options) as ranked:
        assert tokens(ranked.engine, adapters) == tokens(alone, adapters)
        models = [runner.model for runner in ranked.runners]
        assert len(models) == size
        for rank, model in enumerate(models):
            for module in CASES[name].dense(quantized(root, name)):
                site = next(site for site in whole.sites() if site.name == module)
                part = site.part(rank, size)
                # seen from tokens to features, an embedding's matrix lies on its side
                turned = site.kind is SiteKind.EMBEDDING
                rows, cols = (part.cols, part.rows) if turned else (part.rows, part.cols)
                assert torch.equal(model.dense_weight(module), whole.dense_weight(module)[rows, cols])
            assert linear_bytes(model) == pytest.approx(linear_bytes(whole) / size, rel=0.03)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("gguf")])
def test_tensors_that_are_missing_or_misshapen_are_named(root: Path, name: str, tmp_path: Path) -> None:
    plan = planned(quantized(root, name), name)
    spoiled = Path(shutil.copytree(quantized(root, name), tmp_path / "spoiled"))
    file = spoiled / "model.safetensors"
    whole = load_file(file)
    matrix = plan.spec.matrices()["model.layers.1.mlp.down_proj"]
    expected = plan.format.tensors(matrix, frozenset(whole))
    assert expected
    for key in [key for key, one in expected.items() if one.required]:
        missing = {name: tensor for name, tensor in whole.items() if name != key}
        for tensors in (missing, {**missing, key: torch.cat([whole[key].flatten()] * 2)}):
            save_file(tensors, file, {"format": "pt"})
            with pytest.raises(InvalidModel, match=rf"\b{re.escape(key)}\b"):
                load(spoiled, name)


@pytest.mark.parametrize("asked", ["nf4", "int8"])
@pytest.mark.parametrize(("name", "stored"), [("gptq-4bit-g128", "gptq-int4-g128"), ("gguf-q4_0", "gguf-q4_0")])
def test_what_is_quantized_is_not_quantized_again(root: Path, name: str, stored: str, asked: str) -> None:
    config = ModelConfig(device="cpu", quantization=asked)
    with pytest.raises(UnsupportedFeature, match=rf"quantization '{asked}'.* as {stored}\b"):
        plan_model(quantized(root, name), config)
