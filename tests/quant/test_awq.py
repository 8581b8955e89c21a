"""AWQ: every property that checkpoints have, on single matrices and their slabs; what is refused, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AwqConfig

from loraplex.errors import InvalidModel, UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.quant import awq
from loraplex.quant.base import Matrix, Slab
from loraplex.quant.formats import choose_format
from loraplex_kernels.quant.stored import decode
from tests.quant.cases import dense_base
from tests.quant.packers import awq as packer
from tests.quant.packers.integers import Integers, Rounding, TensorReader, expected_weights
from tests.quant.test_gptq import assert_own_memory, spoil
from tests.tiny import load_tiny

ROWS, COLUMNS = 48, 256
MATRIX = Matrix("model.layers.0.mlp.down_proj", ROWS, COLUMNS)
ROUNDINGS = {
    "g32": Rounding(4, 32, symmetric=False),
    "g64-bf16": Rounding(4, 64, symmetric=False, dtype=torch.bfloat16),
    "g128-without-zero-point": Rounding(4, 128, symmetric=True),
    "row": Rounding(4, -1, symmetric=False),
}


def integers(rounding: Rounding) -> Integers:
    return rounding.round(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(7)) * 0.05, 2)


def section(rounding: Rounding, **values: object) -> ConfigFields:
    given = {"bits": 4, "group_size": rounding.group, "zero_point": not rounding.symmetric, "version": "gemm"}
    return ConfigFields({"quant_method": "awq", **given, **values})


@pytest.mark.parametrize("name", ROUNDINGS)
def test_a_matrix_and_its_slabs_are_those_of_the_packer(name: str) -> None:
    rounding = ROUNDINGS[name]
    packed = integers(rounding)
    reader = TensorReader(MATRIX, packer.pack(packed))
    form = awq.read_config(section(rounding))
    form.check(MATRIX, reader)
    grain = form.grain(MATRIX)
    assert (grain.rows, grain.cols) == (1, max(rounding.group, 1))
    part = (37, 202) if rounding.group == -1 else (rounding.group, 2 * rounding.group)
    for rows in ((0, ROWS), (16, 32), (5, 29)):
        for cols in ((0, COLUMNS), part):
            stored = form.read(reader, Slab(MATRIX, slice(*rows), slice(*cols)))
            assert torch.equal(decode(stored, torch.float32), packed.dense()[slice(*rows), slice(*cols)])
            assert (stored.scales.zeros is None) == rounding.symmetric
            assert_own_memory(stored, reader)


PUBLISHED: tuple[dict[str, object], ...] = (
    # AutoAWQ; early AutoAWQ; transformers 5; GPTQModel
    {"bits": 4, "group_size": 64, "zero_point": True, "version": "gemm", "modules_to_not_convert": None},
    {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"},
    {**AwqConfig(bits=4, group_size=64).to_dict()},
    {"bits": 4, "group_size": 64, "format": "gemm", "checkpoint_format": "gemm", "pack_dtype": "int32", "sym": False},
    {"bits": 4, "group_size": 64, "backend": "autoawq", "modules_to_not_convert": ["lm_head"]},
)


@pytest.mark.parametrize("values", PUBLISHED, ids=["autoawq", "early", "transformers", "gptqmodel", "backend"])
def test_configurations_as_libraries_write_them(values: dict[str, object]) -> None:
    form = choose_format("", ConfigFields({"quantization_config": {**values, "quant_method": "awq"}}))
    assert form == awq.read_config(section(ROUNDINGS["g64-bf16"]))
    assert form.name == "awq-int4-g64"


REFUSED: tuple[tuple[dict[str, object], str], ...] = (
    ({"version": "gemv"}, r"quantization_config\.version 'gemv' of awq; supported is gemm"),
    ({"version": None, "format": "gemv_fast"}, r"version 'gemv_fast' of awq; supported is gemm"),
    ({"backend": "llm-awq"}, r"version 'llm-awq' of awq; supported is gemm"),
    ({"bits": 8}, r"quantization_config\.bits 8 of awq; supported are 4"),
    ({"group_size": 48}, r"quantization_config\.group_size 48 of awq; supported are -1, 32, 64, 128"),
    ({"dynamic": {"+:.*": {"bits": 8}}}, r"dynamic of awq has '\+:\.\*'; supported"),
)


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[str(values) for values, _ in REFUSED])
def test_configurations_we_lack(values: dict[str, object], message: str) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", **values}
    with pytest.raises(UnsupportedFeature, match=message):
        choose_format("", ConfigFields({"quantization_config": config}))


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (48, 192, "down_proj: 192 inputs are no multiple of group_size 128 of awq-int4-g128"),
        (44, 256, "down_proj: 44 outputs are no multiple of the 8 of a word of awq-int4-g128"),
    ],
)
def test_sizes_that_do_not_fit(rows: int, columns: int, message: str) -> None:
    form = awq.read_config(section(Rounding(4, 128, symmetric=False)))
    with pytest.raises(UnsupportedFeature, match=message):
        form.check(Matrix(MATRIX.name, rows, columns), TensorReader(MATRIX, {}))


def test_a_checkpoint_with_its_head_quantized_and_tensors_that_are_refused(tmp_path: Path) -> None:
    path, name = tmp_path / "head", "model.layers.1.mlp.down_proj"
    packer.checkpoint(64, lm_head=True, modules_to_not_convert=["model.embed_tokens"])(dense_base(tmp_path), path)
    model = load_tiny(path)
    for module, weight in expected_weights(path).items():
        assert torch.equal(model.dense_weight(module), weight), module

    def float32_scales(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.scales"] = tensors[f"{name}.scales"].float()

    with pytest.raises(InvalidModel, match=r"scales' is torch\.float32, expected torch\.float16 or torch\.bfloat16"):
        load_tiny(spoil(path, tmp_path / "wide", float32_scales))
    with pytest.raises(InvalidModel, match=rf"lacks {name}\.qzeros"):
        load_tiny(spoil(path, tmp_path / "missing", lambda tensors: tensors.pop(f"{name}.qzeros")))
