"""FP8 checkpoints beyond what holds for every format: each form of scale, what is left dense, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.config import ModelConfig
from loraplex.errors import InvalidModel, LoraplexError, UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.models.loader import plan_model
from loraplex.quant.base import WHOLE, Expected, Matrix, QuantFormat
from loraplex.quant.formats import choose_format
from tests.quant.cases import dense_base, quantized
from tests.quant.packers import fp8
from tests.quant.tensor_reader import NAME, TensorReader, read, weight
from tests.tiny import Chunk, PackedRunner, load_tiny, oracle, prompt, tiny_checkpoint

MATRIX = Matrix(NAME, 320, 448)
HEAD = Matrix("lm_head", 320, 448, end=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fp8")


def of(**config: object) -> QuantFormat:
    """The format of a ``quantization_config``."""
    return choose_format("", ConfigFields({"quantization_config": {"quant_method": "fp8", **config}}))


def dense(matrix: Matrix = MATRIX) -> torch.Tensor:
    return torch.randn(matrix.out_features, matrix.in_features, generator=torch.Generator().manual_seed(0)) * 0.05


def blocks(weight_: torch.Tensor) -> fp8.Pair:
    return fp8.in_blocks(weight_)


def small_blocks(weight_: torch.Tensor) -> fp8.Pair:
    return fp8.in_blocks(weight_, 32)


FORMS: dict[str, tuple[Callable[[torch.Tensor], fp8.Pair], Callable[[torch.Tensor], torch.Tensor], str, int]] = {
    "blocks": (blocks, lambda scale: scale, "weight_scale_inv", 128),
    "blocks of 32": (small_blocks, lambda scale: scale, "weight_scale_inv", 32),
    "blocks, bfloat16 scales": (blocks, lambda scale: scale.bfloat16(), "weight_scale_inv", 128),
    "blocks by the other name": (blocks, lambda scale: scale, "weight_scale", 128),
    "scalar": (fp8.whole, lambda scale: scale.reshape(()), "weight_scale", 0),
    "one number": (fp8.whole, lambda scale: scale, "weight_scale", 0),
    "scalar of transformers": (fp8.whole, lambda scale: scale.reshape(()), "weight_scale_inv", 0),
    "rows": (fp8.by_rows, lambda scale: scale, "weight_scale", 0),
    "rows, flat": (fp8.by_rows, lambda scale: scale.flatten(), "weight_scale", 0),
}
#: of 320 rows and 448 columns, the last blocks are cut short
CUTS = [(WHOLE, WHOLE), (slice(128, 256), WHOLE), (slice(256, 320), WHOLE), (WHOLE, slice(128, 384))]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_scale_gives_code_times_scale_of_its_part(form: str, cut: tuple[slice, slice]) -> None:
    pack, shape, name, size = FORMS[form]
    codes, scale = pack(dense())
    scale = shape(scale)
    expected = codes.float() * fp8.spread(scale.float(), codes.shape, size)
    quant_format = of(weight_block_size=[size, size]) if size else of()
    reader = TensorReader({"weight": codes, name: scale, "input_scale": torch.tensor([0.5])})
    assert torch.equal(weight(quant_format, reader, MATRIX, *cut), expected[cut])


def test_scales_take_the_memory_of_the_format() -> None:
    codes, scale = fp8.in_blocks(dense())
    quant_format = of(weight_block_size=[128, 128])
    stored = read(quant_format, TensorReader({"weight": codes, "weight_scale_inv": scale}), MATRIX)
    assert stored.scales.nbytes == 3 * 4 * 4
    assert quant_format.nbytes(MATRIX) == 320 * 448 + 3 * 4 * 4
    assert quant_format.nbytes(HEAD) is None


def test_fbgemm_fp8_is_rows_by_another_name() -> None:
    codes, scale = fp8.by_rows(dense())
    quant_format = of(quant_method="fbgemm_fp8", activation_scale_ub=1200.0, modules_to_not_convert=["lm_head"])
    assert quant_format.name == "fbgemm_fp8"
    reader = TensorReader({"weight": codes, "weight_scale": scale, "input_scale_ub": torch.tensor([1200.0])})
    assert torch.equal(weight(quant_format, reader, MATRIX), codes.float() * scale)


def test_logits_are_those_of_transformers(root: Path) -> None:
    path = quantized(root, "fp8-block")
    runner, tokens = PackedRunner(load_tiny(path)), prompt(24)
    expected = oracle(path)(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(runner.step([Chunk("one", tokens)])[0], expected, rtol=1e-4, atol=1e-4)


def test_modules_left_out_stay_dense_and_may_be_cut_anywhere(root: Path) -> None:
    path = root / "partly"
    left = ["lm_head", "model.layers.0", "o_proj", "*gate"]
    fp8.checkpoint(fp8.in_blocks, "weight_scale_inv", weight_block_size=[128, 128], modules_to_not_convert=left)(
        dense_base(root), path
    )
    tensors, whole = load_file(path / "model.safetensors"), load_file(dense_base(root) / "model.safetensors")
    for key in [key for key in whole if key.startswith("model.layers.0.") or "o_proj" in key]:
        tensors[key] = whole[key]
        tensors.pop(key.removesuffix("weight") + "weight_scale_inv", None)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    model = load_tiny(path)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"):
        assert torch.equal(model.dense_weight(name), whole[f"{name}.weight"])
    expected = fp8.dense(path)["model.layers.1.mlp.up_proj"]
    assert torch.equal(model.dense_weight("model.layers.1.mlp.up_proj"), expected)
    plan = plan_model(path, ModelConfig(device="cpu", dtype="float32"))
    quantized_by_name = {name: plan.format.nbytes(matrix) for name, matrix in plan.spec.matrices().items()}
    assert {name for name, nbytes in quantized_by_name.items() if nbytes is not None} == set(fp8.dense(path))
    assert plan.format.grain(plan.spec.matrices()["model.layers.0.self_attn.k_proj"]).rows == 1


def test_scales_of_the_cache_are_passed_over_with_one_line(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = root / "cached"
    fp8.checkpoint(fp8.whole, "weight_scale", static=True)(tiny_checkpoint(root, "llama"), path)
    tensors = load_file(path / "model.safetensors")
    for layer in ("model.layers.0.self_attn", "model.layers.1.self_attn"):
        tensors.update({f"{layer}.k_proj.k_scale": torch.ones(1), f"{layer}.v_scale": torch.ones(())})
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.INFO):
        model = load_tiny(path)
    assert [record.getMessage() for record in caplog.records if "KV cache" in record.getMessage()] == [
        "scales of the KV cache (model.layers.0.self_attn.k_proj.k_scale, ...) are not used: the cache holds the "
        "compute dtype"
    ]
    name = "model.layers.1.self_attn.k_proj"
    assert torch.equal(model.dense_weight(name), fp8.dense(path)[name])


def test_ranks_that_would_cut_a_block_are_refused_with_sizes_that_fit(root: Path) -> None:
    plan = plan_model(quantized(root, "fp8-block"), ModelConfig(device="cpu", dtype="float32"))
    message = r"size 4 cuts model.layers.0.self_attn.k_proj into 64 rows each, which the weight_block_size \[128, 128\]"
    with pytest.raises(UnsupportedFeature, match=message + r" of fp8-block128x128 does not allow; .* are 1, 2$"):
        plan.check_ranks(4)


@pytest.mark.parametrize(
    ("rows", "split"), [(32, "at row 144"), (16, "at row 196"), (64, "at row 32")], ids=["32", "16", "64"]
)
def test_stretches_that_begin_or_end_within_a_block_are_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: int, split: str
) -> None:
    """in_proj of a state-space layer is z 64, x 64, B 32, C 32 and dt 8, and its halves are none of these together."""
    path = tiny_checkpoint(tmp_path_factory.getbasetemp(), "mamba2")
    plan = plan_model(path, ModelConfig(device="cpu", dtype="float32"))
    plan = replace(plan, format=of(weight_block_size=[rows, 32]))
    plan.check_ranks(1)
    message = rf"size 2 cuts backbone.layers.0.mixer.in_proj {split}, which the weight_block_size \[{rows}, 32\]"
    with pytest.raises(UnsupportedFeature, match=message + r" of fp8-\S+ does not allow; .* are 1$"):
        plan.check_ranks(2)


@pytest.mark.parametrize("cut", [(slice(64, 128), WHOLE, "64 rows"), (WHOLE, slice(64, 128), "64 columns")])
def test_a_part_that_begins_within_a_block_is_refused(cut: tuple[slice, slice, str]) -> None:
    codes, scale = fp8.in_blocks(dense())
    reader = TensorReader({"weight": codes, "weight_scale_inv": scale})
    with pytest.raises(UnsupportedFeature, match=rf"{NAME}: .* begins at {cut[2]}, allowed are multiples of 128"):
        read(of(weight_block_size=[128, 128]), reader, MATRIX, cut[0], cut[1])


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"activation_scheme": "token"}, InvalidModel, r"activation_scheme is 'token', expected dynamic or static"),
        ({"fmt": "e5m2"}, UnsupportedFeature, r"quantization_config.fmt 'e5m2'; supported is 'e4m3'"),
        ({"weight_block_size": [128]}, InvalidModel, r"weight_block_size is \[128\], expected \[rows, columns\]"),
        (
            {"weight_block_size": [128, 0]},
            InvalidModel,
            r"weight_block_size is \[128, 0\], expected a list of integers",
        ),
        ({"weight_block_size": 128}, InvalidModel, r"weight_block_size is 128, expected a list of integers"),
        ({"weight_block_size": [1, 48]}, UnsupportedFeature, r"weight_block_size \[1, 48\]; .* a multiple of 32"),
        ({"modules_to_not_convert": "lm_head"}, InvalidModel, r"modules_to_not_convert is 'lm_head', expected a list"),
        ({"ignored_layers": [1]}, InvalidModel, r"ignored_layers is \[1\], expected a list of strings"),
    ],
)
def test_configs_that_are_refused(config: dict[str, object], error: type[LoraplexError], message: str) -> None:
    with pytest.raises(error, match=message):
        of(**config)


def spoiled(key: str, tensor: torch.Tensor) -> TensorReader:
    codes, scale = fp8.in_blocks(dense())
    return TensorReader({"weight": codes, "weight_scale_inv": scale, key: tensor})


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_that_are_no_number_are_refused_in_the_part_that_has_them(code: int) -> None:
    codes = fp8.in_blocks(dense())[0]
    codes.view(torch.uint8)[130, 5] = code
    quant_format, reader = of(weight_block_size=[128, 128]), spoiled("weight", codes)
    read(quant_format, reader, MATRIX, slice(0, 128))
    with pytest.raises(InvalidModel, match=rf"tensor '{NAME}.weight' holds NaN \(code 0x7f or 0xff\)"):
        read(quant_format, reader, MATRIX, slice(128, 256))


@pytest.mark.parametrize(
    ("key", "tensor", "error", "message"),
    [
        ("weight", dense().to(torch.float8_e5m2), UnsupportedFeature, r"is torch.float8_e5m2, supported is .*e4m3fn"),
        ("weight_scale_inv", torch.full((3, 4), float("inf")), InvalidModel, r"holds a scale that is not finite"),
        (
            "weight_scale_inv",
            torch.ones(4, 3),
            InvalidModel,
            r"has shape \[4, 3\], allowed are \[\], \[1\], .*\[3, 4\]",
        ),
        ("input_scale", torch.ones(2), InvalidModel, r"has shape \[2\], expected one number"),
    ],
)
def test_tensors_that_are_refused(key: str, tensor: torch.Tensor, error: type[LoraplexError], message: str) -> None:
    with pytest.raises(error, match=rf"tensor '{NAME}.{key}' {message}"):
        read(of(weight_block_size=[128, 128]), spoiled(key, tensor), MATRIX)


@pytest.mark.parametrize("dtype", ["float8_e5m2", "float8_e4m3fnuz"])
def test_other_floats_are_refused_by_name_in_files(root: Path, tmp_path: Path, dtype: str) -> None:
    fp8.checkpoint(fp8.whole, "weight_scale")(tiny_checkpoint(root, "llama"), tmp_path / "model")
    file, key = tmp_path / "model/model.safetensors", f"{NAME}.weight"
    tensors = load_file(file)
    save_file({**tensors, key: tensors[key].float().to(getattr(torch, dtype))}, file, {"format": "pt"})
    with pytest.raises(LoraplexError, match=rf"tensor '{key}' is .*(float8_e5m2, supported|F8_E4M3FNUZ, allowed)"):
        load_tiny(tmp_path / "model")


def test_scales_of_bytes_are_refused() -> None:
    expected = of(weight_block_size=[128, 128]).tensors(MATRIX, frozenset())[f"{NAME}.weight_scale_inv"]
    assert expected == Expected(None, (torch.float32, torch.bfloat16, torch.float16))
