"""Adapters of state-space models that a server refuses, each by name, at load; and it goes on as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.engine.local import LocalEngine
from loraplex.errors import LoraplexError, Mismatch, UnsupportedFeature
from tests.adapters.peft_sites import files_of
from tests.engines import local_engine
from tests.fakes_adapters import write_adapter
from tests.kind_matrix import KindMatrix

Tensors = dict[str, torch.Tensor]
#: outputs of in_proj of a mamba2 with two groups
STRETCHES = "z 64, x 64, B 32, C 32, dt 8"


@pytest.fixture(scope="module")
def matrix(kinds_root: Path) -> KindMatrix:
    return KindMatrix(kinds_root, "mamba2", tied=False)


@pytest.fixture(scope="module")
def engine(matrix: KindMatrix, tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    return local_engine(matrix.base_dir, adapter_dirs=(matrix.root, tmp_path_factory.getbasetemp()))


def refusal(engine: LocalEngine, matrix: KindMatrix, path: Path) -> LoraplexError:
    """Of a load; after it nothing is held, and the base answers as ever."""
    with pytest.raises(LoraplexError) as caught:
        engine.load_adapter("refused", str(path))
    assert engine.list_adapters() == ()
    case = matrix.cases("")[1]
    [base] = engine.generate([case.request])
    assert tuple(base.token_ids) == case.expected
    return caught.value


def changed(matrix: KindMatrix, name: str, out: Path, change: Callable[[dict[str, Any], Tensors], None]) -> Path:
    config, tensors = files_of(matrix.adapter(name))
    change(config, tensors)
    return write_adapter(out, config, tensors)


@pytest.mark.parametrize("name", ["lora", "adalora", "dora", "loha", "ia3", "vera"])
def test_nothing_is_put_around_a_convolution(
    engine: LocalEngine, matrix: KindMatrix, tmp_path: Path, name: str
) -> None:
    def also_conv(config: dict[str, Any], tensors: Tensors) -> None:
        config["target_modules"] = [*config["target_modules"], "conv1d"]

    error = refusal(engine, matrix, changed(matrix, name, tmp_path / name, also_conv))
    assert isinstance(error, UnsupportedFeature)
    assert error.field == "target_modules"
    assert "'backbone.layers.0.mixer.conv1d', a convolution of each channel by itself" in str(error)
    assert "modules_to_save" in str(error)


@pytest.mark.parametrize(("first", "stop"), [(0, 128), (64, 200), (0, 192)], ids=["no BC dt", "no z", "no dt"])
@pytest.mark.parametrize("name", ["lora", "dora", "lora-lora-bias"])
def test_factors_of_some_stretches_alone(
    engine: LocalEngine, matrix: KindMatrix, tmp_path: Path, name: str, first: int, stop: int
) -> None:
    def fewer(config: dict[str, Any], tensors: Tensors) -> None:
        for key, tensor in tensors.items():
            if "in_proj.lora_B" in key or "in_proj.lora_magnitude" in key:
                tensors[key] = tensor[first:stop].clone()

    error = refusal(engine, matrix, changed(matrix, name, tmp_path / name, fewer))
    assert isinstance(error, Mismatch)
    assert f"for some of the outputs, which are {STRETCHES}" in str(error)
    assert f"[{stop - first}" in str(error)


@pytest.mark.parametrize("name", ["lora", "dora", "loha", "ia3", "vera", "adalora", "lora-saved-mixer"])
def test_adapters_of_a_base_with_more_groups(engine: LocalEngine, matrix: KindMatrix, name: str) -> None:
    other = KindMatrix(matrix.root, "mamba2-8-groups", tied=False)
    error = refusal(engine, matrix, other.adapter(name))
    assert isinstance(error, Mismatch)
    assert "made for another base model" in str(error)
    assert (f"which are {STRETCHES}" in str(error)) is (name != "vera" and "saved" not in name)


def test_the_same_adapters_are_served_where_they_fit(engine: LocalEngine, matrix: KindMatrix) -> None:
    """So that none of the above is refused for anything else."""
    for name in ("lora", "adalora", "dora", "loha", "ia3", "vera", "lora-lora-bias", "lora-saved-mixer"):
        engine.load_adapter(name, str(matrix.adapter(name)))
        engine.unload_adapter(name)
