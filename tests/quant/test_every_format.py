"""What holds for every format: the weights of its library, the tokens of a dense model of them, the bytes it says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.config import ModelConfig
from loraplex.engine.local import LocalEngine
from loraplex.errors import InvalidModel, UnsupportedFeature
from loraplex.layers.linear import Linear
from loraplex.models.base import BaseModel
from loraplex.models.decoder import Decoder
from loraplex.models.loader import ModelPlan, plan_model
from loraplex.models.mixers.base import HeldLinear
from loraplex.models.sites import SiteKind
from loraplex.parallel.runs import take
from loraplex.parallel.shard import Cut, Shard, Stretch
from loraplex.quant.base import Slab
from loraplex.quant.bnb4 import Bnb4Format
from loraplex.quant.loading import Storage
from loraplex_kernels.quant.cpu import CpuQuant
from loraplex_kernels.quant.reference import ReferenceQuant
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


def linears(model: object) -> list[Linear]:
    """Of all layers."""
    assert isinstance(model, Decoder)
    held = [one for layer in model._parts.layers for block in layer.blocks for one in block.held]
    return [one.linear for one in held if isinstance(one, HeldLinear)]


def linear_bytes(model: object) -> int:
    return sum(linear.weight.nbytes for linear in linears(model))


def num_weights(model: object) -> int:
    sizes = [linear.weight.shape for linear in linears(model)]
    return sum(rows * columns for rows, columns in sizes)


def tokens(engine: LocalEngine, adapters: dict[str, Path]) -> list[list[int]]:
    """Of one batch in which every row has its own adapter, or none."""
    for name, path in adapters.items():
        engine.load_adapter(name, str(path))
    return [generation.token_ids for generation in engine.generate(mixed_requests(1))]


@dataclass(frozen=True)
class Alone:
    """A quantized model on one rank, and what it answers."""

    model: BaseModel
    tokens: list[list[int]]


@pytest.fixture(scope="module")
def alone(root: Path) -> Callable[[str], Alone]:
    """By the name of a case; each is made once."""

    @cache
    def made(name: str) -> Alone:
        adapters = make_adapters(dense_base(root), root / "adapters")
        options = {"adapter_dirs": (root / "adapters",), "quantization": CASES[name].quantization, **OPTIONS}
        engine = local_engine(quantized(root, name), **options)
        return Alone(engine.core._steps.executor.runner.model, tokens(engine, adapters))

    return made


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
def test_tokens_are_those_of_the_dense_model_with_adapters_in_one_batch(
    root: Path, alone: Callable[[str], Alone], name: str
) -> None:
    adapters = make_adapters(dense_base(root), root / "adapters")
    dense = local_engine(dequantized(root, name), adapter_dirs=(root / "adapters",), **OPTIONS)
    assert alone(name).tokens == tokens(dense, adapters)


@pytest.mark.parametrize(("name", "size"), SHARED)
def test_ranks_hold_their_parts_and_give_the_tokens_of_one(
    root: Path, alone: Callable[[str], Alone], name: str, size: int
) -> None:
    adapters = make_adapters(dense_base(root), root / "adapters")
    options = {"adapter_dirs": (root / "adapters",), "quantization": CASES[name].quantization, **OPTIONS}
    one = alone(name)
    with ranked_engine(quantized(root, name), size, **options) as ranked:
        assert tokens(ranked.engine, adapters) == one.tokens
        models = [runner.model for runner in ranked.runners]
    assert len(models) == size
    for module in CASES[name].dense(quantized(root, name)):
        site = next(site for site in one.model.sites() if site.name == module)
        whole = one.model.dense_weight(module)
        for rank, model in enumerate(models):
            part = site.part(rank, size)
            # seen from tokens to features, an embedding's matrix lies on its side
            expected = whole[part.cols] if site.kind is SiteKind.EMBEDDING else take(whole, part.rows)[:, part.cols]
            assert torch.equal(model.dense_weight(module), expected)
    for model in models:
        assert linear_bytes(model) == pytest.approx(linear_bytes(one.model) / size, rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_cut_by_stretches_is_the_rows_that_a_rank_has(root: Path, name: str) -> None:
    """Stretches as of a state-space layer's projection, some of them on every rank."""
    path, dense = quantized(root, name), CASES[name].dense(quantized(root, name))
    plan = planned(path, name)
    matrix = plan.spec.matrices()["model.layers.0.self_attn.q_proj"]
    step = plan.format.grain(matrix).rows
    heads, groups = (2, 1) if step > 1 else (8, 2)
    sizes = (256, 128, 128) if step > 1 else (176, 240, 96)
    stretches = tuple(Stretch(*one) for one in zip(sizes, (heads, groups, heads if step == 1 else 1), strict=True))
    cut = Cut(Shard.COLUMN, heads, "heads", stretches=stretches)
    whole, x = dense[matrix.name], torch.randn(5, matrix.in_features)
    with plan.source.open(path, plan.spec, plan.placement) as reader:
        for backend in (CpuQuant(), ReferenceQuant()):
            storage = Storage(reader, plan.format, plan.placement, backend)
            for rank in range(2):
                runs = cut.part(matrix.out_features, matrix.in_features, rank, 2).rows
                assert len(runs) > 1 or rank
                weight = storage.weight([Slab(matrix, run, slice(0, matrix.in_features)) for run in runs])
                assert torch.equal(weight.dequantize(), take(whole, runs))
                torch.testing.assert_close(weight.matmul(x, None), x @ take(whole, runs).T, rtol=1e-4, atol=1e-4)
                nested = isinstance(plan.format, Bnb4Format) and plan.format.nested
                # one part, as it is to the adapters of its layer; or one a run
                assert len(weight._matrix._parts) == (len(runs) if nested else 1)


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
