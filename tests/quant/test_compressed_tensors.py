"""compressed-tensors beyond what holds for every format: every way a group may be stored, and what is refused."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.config import ModelConfig
from loraplex.errors import InvalidModel, LoraplexError, UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.models.loader import plan_model
from loraplex.quant.base import WHOLE, Matrix, QuantFormat
from loraplex.quant.compressed_tensors import CompressedTensorsFormat
from loraplex.quant.formats import choose_format
from tests.quant.cases import CT_FLOAT8, CT_INT4, CT_INT8, configure, dense_base
from tests.quant.packers import compressed
from tests.quant.tensor_reader import NAME, TensorReader, read, weight
from tests.tiny import Chunk, PackedRunner, load_tiny, oracle, prompt

MATRIX = Matrix(NAME, 192, 512)
INPUTS = compressed.QuantizationArgs(num_bits=8, dynamic=True, strategy="token")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compressed")


def of(*schemes: compressed.QuantizationScheme, **config: object) -> QuantFormat:
    """The format of a config.json with these groups, and other keys of its ``quantization_config``."""
    return choose_format("", ConfigFields({"quantization_config": {**compressed.config(*schemes), **config}}))


def dense(dtype: torch.dtype = torch.bfloat16, matrix: Matrix = MATRIX) -> torch.Tensor:
    made = torch.randn(matrix.out_features, matrix.in_features, generator=torch.Generator().manual_seed(0)) * 0.05
    return (made + 0.02).to(dtype)  # zero points that are not in the middle


PACK, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
SCHEMES = {
    "int4 g128": compressed.scheme(PACK, num_bits=4, strategy="group", group_size=128),
    "int4 g32 asymmetric": compressed.scheme(PACK, num_bits=4, strategy="group", group_size=32, symmetric=False),
    "int4 channel": compressed.scheme(PACK, num_bits=4, strategy="channel"),
    "int4 channel asymmetric": compressed.scheme(PACK, num_bits=4, strategy="channel", symmetric=False),
    "int4 tensor": compressed.scheme(PACK, num_bits=4, strategy="tensor"),
    "int4 order of weights": compressed.scheme(PACK, num_bits=4, strategy="group", group_size=64, actorder="weight"),
    "packed int8 g64": compressed.scheme(PACK, num_bits=8, strategy="group", group_size=64),
    "packed int8 channel asymmetric": compressed.scheme(PACK, num_bits=8, strategy="channel", symmetric=False),
    "int8 channel": compressed.scheme(INT, num_bits=8, strategy="channel", inputs=INPUTS),
    "int8 channel asymmetric": compressed.scheme(INT, num_bits=8, strategy="channel", symmetric=False, inputs=INPUTS),
    "int8 tensor": compressed.scheme(INT, num_bits=8, strategy="tensor", inputs=INPUTS),
    "int8 tensor asymmetric": compressed.scheme(INT, num_bits=8, strategy="tensor", symmetric=False),
    "int8 block": compressed.scheme(NAIVE, num_bits=8, strategy="block", block_structure=[64, 128]),
    "int4 in int8 g128": compressed.scheme(INT, num_bits=4, strategy="group", group_size=128, inputs=INPUTS),
    "float8 tensor": compressed.scheme(FLOAT, num_bits=8, type="float", strategy="tensor", inputs=INPUTS),
    "float8 channel": compressed.scheme(FLOAT, num_bits=8, type="float", strategy="channel", inputs=INPUTS),
    "float8 block": compressed.scheme(FLOAT, num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
    "float8 naive": compressed.scheme(NAIVE, num_bits=8, type="float", strategy="group", group_size=128),
}
#: rows begin at blocks of 128 and 64, columns at groups of 128
CUTS = [(WHOLE, WHOLE), (slice(128, 192), WHOLE), (WHOLE, slice(128, 384))]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_what_the_library_decompresses(name: str, dtype: torch.dtype, cut: tuple[slice, slice]) -> None:
    one = SCHEMES[name]
    state = compressed.compress(dense(dtype), one)
    expected = compressed.decompress(state, one)
    assert expected.dtype is dtype
    assert (expected - dense(dtype)).abs().max() < 0.06  # it is the matrix, not only what we agree on
    assert torch.equal(weight(of(one), TensorReader(state), MATRIX, *cut), expected.float()[cut])


@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_are_those_of_the_format(name: str) -> None:
    one = SCHEMES[name]
    state = compressed.compress(dense(), one)
    stored, quant_format = read(of(one), TensorReader(state), MATRIX), of(one)
    published = sum(tensor.nbytes for end, tensor in state.items() if end != "weight_shape")
    assert stored.nbytes == pytest.approx(published, rel=0.03)
    assert quant_format.nbytes(MATRIX) == pytest.approx(stored.nbytes, rel=0.03)


def in_order(groups: torch.Tensor) -> compressed.Tensors:
    """int4 in groups of 128 whose columns stand as ``groups`` says; the library of today writes no such checkpoint."""
    state = compressed.compress(dense(), SCHEMES["int4 g128"])
    return {**state, "weight_g_idx": groups.int()}


def ordered(**weights: object) -> QuantFormat:
    config = compressed.config(SCHEMES["int4 g128"])
    config["config_groups"]["group_0"]["weights"].update({"actorder": "group", **weights})
    return choose_format("", ConfigFields({"quantization_config": config}))


def test_columns_in_another_order_take_the_scales_of_their_groups() -> None:
    groups = (torch.arange(512) // 128)[torch.randperm(512, generator=torch.Generator().manual_seed(0))]
    state = in_order(groups)
    one = SCHEMES["int4 g128"]
    units = compressed.decompress({**state, "weight_scale": torch.ones_like(state["weight_scale"])}, one)
    expected = (units * state["weight_scale"][:, groups]).float()
    quant_format, reader = ordered(), TensorReader(state)
    assert torch.equal(weight(quant_format, reader, MATRIX, slice(64, 128)), expected[64:128])
    assert quant_format.grain(MATRIX).cols == 512


@pytest.mark.parametrize("groups", [torch.full((512,), -1), torch.arange(512) // 128])
def test_columns_in_the_order_of_their_groups_need_no_other(groups: torch.Tensor) -> None:
    state = in_order(groups)
    stored = read(ordered(actorder=True), TensorReader(state), MATRIX)
    assert stored.order is None
    expected = compressed.decompress(state, SCHEMES["int4 g128"])
    assert torch.equal(weight(ordered(), TensorReader(state), MATRIX), expected.float())


@pytest.mark.parametrize("groups", [torch.zeros(512), torch.arange(512) // 100, torch.arange(512) // 64])
def test_groups_of_unlike_sizes_are_refused(groups: torch.Tensor) -> None:
    message = rf"'{NAME}.weight_g_idx' does not give each of 4 groups the 128 columns of group_size"
    with pytest.raises(InvalidModel, match=message):
        read(ordered(), TensorReader(in_order(groups)), MATRIX)


@pytest.mark.parametrize("name", ["int8 channel", "int4 g128"])
def test_logits_are_those_of_transformers(root: Path, name: str) -> None:
    """Which takes scales to the type it computes in: they are float32 here. It loads no packed zero points."""
    path = root / f"logits-{name.replace(' ', '-')}"
    one = SCHEMES[name].model_copy(update={"input_activations": None})
    compressed.checkpoint(one, torch.float32)(dense_base(root), path)
    runner, tokens = PackedRunner(load_tiny(path)), prompt(24)
    expected = oracle(path)(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(runner.step([Chunk("one", tokens)])[0], expected, rtol=1e-4, atol=1e-4)


def test_the_embedding_is_of_its_class_whatever_its_name() -> None:
    """Mamba2's is backbone.embeddings."""
    rows = compressed.scheme(INT, targets="Embedding", num_bits=8, strategy="channel")
    quant_format = choose_format("", ConfigFields({"quantization_config": compressed.config(CT_INT4, rows, ignore=())}))
    assert isinstance(quant_format, CompressedTensorsFormat)
    ends = Matrix("backbone.embeddings", 8, 128, end=True), Matrix("lm_head", 8, 128, end=True)
    found = [quant_format.groups.of(matrix) for matrix in ends]
    assert [group and (group.bits, group.packed) for group in found] == [(8, False), (4, True)]


def test_groups_have_their_own_modules_and_the_rest_is_dense(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By name before pattern before class, as the library has it; the head is one of its linear modules."""
    path = root / "mixed"
    compressed.checkpoint(CT_INT4, torch.bfloat16)(dense_base(root), path)
    named = compressed.scheme(INT, targets="model.layers.1.mlp.up_proj", num_bits=8, strategy="channel")
    by_pattern = compressed.scheme(FLOAT, targets=r"re:.*\.mlp\..*", num_bits=8, type="float", strategy="channel")
    rows = compressed.scheme(INT, targets="Embedding", num_bits=8, strategy="channel")
    # the last that fits
    schemes = {"_proj": CT_INT4, "lm_head": CT_INT4, "embed_tokens": rows, "mlp": by_pattern, "1.mlp.up_proj": named}
    whole, tensors, expected = load_file(dense_base(root) / "model.safetensors"), {}, {}
    for key, tensor in whole.items():
        name = key.removesuffix(".weight")
        fitting = [one for part, one in schemes.items() if part in name and not name.endswith("o_proj")]
        if not fitting:
            tensors[key] = tensor
            continue
        state = compressed.compress(tensor.bfloat16(), fitting[-1])
        tensors.update({f"{name}.{end}": part.contiguous() for end, part in state.items()})
        expected[name] = compressed.decompress(state, fitting[-1]).float()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    config = compressed.config(CT_INT4, by_pattern, named, rows, ignore=("re:.*o_proj$",))
    configure(path, quantization_config={**config, "kv_cache_scheme": cache}, tie_word_embeddings=False)
    with caplog.at_level(logging.INFO):
        plan = plan_model(path, ModelConfig(device="cpu", dtype="float32"))
    lines = [record.getMessage() for record in caplog.records if "KV cache" in record.getMessage()]
    assert lines == ["kv_cache_scheme is not used: the KV cache holds the compute dtype"]
    assert plan.format.name == "compressed-tensors-int4-g128-float8-channel-int8-channel"
    assert {"lm_head", "model.embed_tokens"} <= set(expected)
    sizes = {name: plan.format.nbytes(matrix) for name, matrix in plan.spec.matrices().items()}
    assert {name for name, nbytes in sizes.items() if nbytes is not None} == set(expected)
    model = load_tiny(path)
    for name, matrix in expected.items():
        assert torch.equal(model.dense_weight(name), matrix), name
    name = "model.layers.0.self_attn.o_proj"
    assert torch.equal(model.dense_weight(name), whole[f"{name}.weight"])


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"format": "marlin-24"}, UnsupportedFeature, r"format is 'marlin-24'; supported: pack-quantized, int-"),
        ({"format": "nvfp4-pack-quantized"}, UnsupportedFeature, r"format is 'nvfp4-pack-quantized'; supported: pack"),
        ({"format": "mxfp4-pack-quantized"}, UnsupportedFeature, r"format is 'mxfp4-pack-quantized'; supported: pack"),
        ({"format": "dense"}, UnsupportedFeature, r"format is 'dense'; supported: pack"),
        ({"format": "mixed-precision"}, InvalidModel, r"group_0.format is None, expected one of pack"),
        ({"format": None}, UnsupportedFeature, r"format is ''; supported: pack"),
        (
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            UnsupportedFeature,
            r"sparsity_config.format is 'sparse-24-bitmask'; supported: dense",
        ),
        ({"sparsity_config": {"targets": []}}, InvalidModel, r"sparsity_config.format is missing"),
        (
            {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
            UnsupportedFeature,
            r"transform_config is .*hadamard.*; supported: none",
        ),
        ({"config_groups": None}, InvalidModel, r"config_groups is None, expected an object of groups"),
        ({"config_groups": {"FP8_DYNAMIC": ["Linear"]}}, UnsupportedFeature, r"config_groups.FP8_DYNAMIC is \['Linear"),
        ({"config_groups": {"group_0": 1}}, InvalidModel, r"config_groups.group_0 is 1, expected an object"),
        ({"ignore": ["re:("]}, InvalidModel, r"'re:\(' is no regular expression"),
        ({"ignore": "lm_head"}, InvalidModel, r"ignore is 'lm_head', expected a list of strings"),
    ],
)
def test_configs_that_are_refused(config: dict[str, object], error: type[LoraplexError], message: str) -> None:
    one = compressed.config(SCHEMES["int4 g128"])
    one["config_groups"]["group_0"]["format"] = None
    with pytest.raises(error, match=rf"quantization_config.*{message}"):
        choose_format("", ConfigFields({"quantization_config": {**one, **config}}))


@pytest.mark.parametrize(
    ("weights", "form", "error", "message"),
    [
        ({"num_bits": 3}, PACK, UnsupportedFeature, r"num_bits is 3; supported: 4 or 8 as pack-quantized int"),
        ({"num_bits": 6}, INT, UnsupportedFeature, r"num_bits is 6; supported: 4 or 8 as int-quantized int"),
        ({"num_bits": 4, "type": "float"}, NAIVE, UnsupportedFeature, r"num_bits is 4; supported: 8 as naive-quant"),
        ({"num_bits": "8"}, INT, InvalidModel, r"num_bits is '8', expected an integer"),
        ({"type": "float"}, PACK, UnsupportedFeature, r"type is 'float'; supported: int, as the format is pack"),
        ({"type": "int"}, FLOAT, UnsupportedFeature, r"type is 'int'; supported: float, as the format is float"),
        (
            {"type": "float", "symmetric": False},
            FLOAT,
            UnsupportedFeature,
            r"symmetric is False; supported: true for f",
        ),
        ({"symmetric": False, "strategy": "tensor"}, PACK, UnsupportedFeature, r"symmetric is False; supported: true"),
        ({"dynamic": True}, INT, UnsupportedFeature, r"dynamic is True; supported: false"),
        ({"dynamic": "local"}, INT, UnsupportedFeature, r"dynamic is 'local'; supported: false"),
        (
            {"strategy": "token"},
            INT,
            UnsupportedFeature,
            r"strategy is 'token'; supported: tensor, channel, group, blo",
        ),
        ({"strategy": "tensor_group"}, INT, UnsupportedFeature, r"strategy is 'tensor_group'; supported: tensor, cha"),
        ({"strategy": "group", "group_size": 16}, INT, UnsupportedFeature, r"group_size is 16; supported: .* of 32"),
        ({"strategy": "group"}, INT, UnsupportedFeature, r"group_size is None; supported: .* of 32"),
        ({"strategy": "group", "group_size": "x"}, INT, InvalidModel, r"group_size is 'x', expected an integer"),
        ({"strategy": "block"}, INT, InvalidModel, r"block_structure is None, expected \[rows, columns\]"),
        ({"strategy": "block", "block_structure": "8"}, INT, InvalidModel, r"block_structure is '8', expected a list"),
        (
            {"strategy": "block", "block_structure": "128x24"},
            INT,
            UnsupportedFeature,
            r"block_structure is '128x24'; supported: columns that are a multiple of 32",
        ),
        ({"actorder": "best"}, PACK, UnsupportedFeature, r"actorder is 'best'; supported: none"),
        (
            {"actorder": "group", "strategy": "channel"},
            PACK,
            UnsupportedFeature,
            r"actorder is 'group'; supported: wei",
        ),
        ({"actorder": "group", "strategy": "group", "group_size": 32}, INT, UnsupportedFeature, r"actorder is 'group'"),
    ],
)
def test_groups_that_are_refused(
    weights: dict[str, object], form: str, error: type[LoraplexError], message: str
) -> None:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}, "format": form}
    section = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    with pytest.raises(error, match=rf"quantization_config.config_groups.group_0.weights.{message}"):
        choose_format("", ConfigFields({"quantization_config": section}))


@pytest.mark.parametrize(
    ("structure", "label"),
    [({"block_structure": "64x128"}, "block64x128"), ({"block_structure": [64, 128]}, "block64x128")],
)
def test_blocks_are_read_from_lists_and_text(structure: dict[str, object], label: str) -> None:
    weights = {"num_bits": 8, "strategy": "block", **structure}
    group = {"targets": ["Linear"], "weights": weights, "format": INT}
    section = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    quant_format = choose_format("", ConfigFields({"quantization_config": section}))
    assert quant_format.name == f"compressed-tensors-int8-{label}"
    assert (quant_format.grain(MATRIX).rows, quant_format.grain(MATRIX).cols) == (64, 128)


@pytest.mark.parametrize(
    ("one", "key", "tensor", "error", "message"),
    [
        (CT_INT4, "weight_shape", torch.tensor([512, 192]), InvalidModel, r"is \[512, 192\], expected \[192, 512\]"),
        (CT_INT4, "weight_scale", torch.full((192, 4), float("nan")), InvalidModel, r"holds a scale that is not fini"),
        (CT_INT8, "input_scale", torch.ones(3), InvalidModel, r"has shape \[3\], expected one number"),
        (
            CT_FLOAT8,
            "weight",
            torch.full((192, 512), float("nan")).to(torch.float8_e4m3fn),
            InvalidModel,
            r"holds NaN \(code 0x7f or 0xff\)",
        ),
        (
            CT_FLOAT8,
            "weight",
            torch.ones(192, 512).to(torch.float8_e5m2),
            UnsupportedFeature,
            r"is torch.float8_e5m2, supported is torch.float8_e4m3fn",
        ),
        (SCHEMES["int8 tensor"], "weight_scale", torch.ones(192, 1), InvalidModel, r"has shape \[192, 1\], expected o"),
    ],
)
def test_tensors_that_are_refused(
    one: compressed.QuantizationScheme, key: str, tensor: torch.Tensor, error: type[LoraplexError], message: str
) -> None:
    state = {**compressed.compress(dense(), one), key: tensor}
    with pytest.raises(error, match=rf"tensor '{NAME}.{key}' {message}"):
        read(of(one), TensorReader(state), MATRIX)


def test_inputs_that_are_no_whole_groups_are_refused() -> None:
    matrix = Matrix(NAME, 64, 192)
    state = compressed.compress(dense(matrix=matrix), SCHEMES["packed int8 g64"])
    quant_format = of(SCHEMES["int4 g128"])
    with pytest.raises(InvalidModel, match=rf"{NAME}: 192 inputs are no multiple of group_size 128"):
        quant_format.check(matrix, TensorReader(state))


def test_a_module_that_no_group_targets_may_not_be_quantized() -> None:
    state = compressed.compress(dense(), CT_INT8)
    for quant_format in (of(CT_INT8, ignore=[NAME]), of(CT_INT8.model_copy(update={"targets": ["re:.*up_proj"]}))):
        assert quant_format.nbytes(MATRIX) is None
        with pytest.raises(InvalidModel, match=rf"{NAME} is stored quantized, but no target of quantization_config"):
            read(quant_format, TensorReader(state), MATRIX)


@pytest.mark.parametrize(
    ("weights", "reason", "sizes"),
    [({"group_size": 256}, "the g256", "1, 2"), ({"actorder": "group"}, "weight_g_idx", "1")],
)
def test_ranks_that_would_cut_a_group_are_refused_with_sizes_that_fit(
    root: Path, tmp_path: Path, weights: dict[str, object], reason: str, sizes: str
) -> None:
    path = Path(shutil.copytree(dense_base(root), tmp_path / "model"))
    config = compressed.config(CT_INT4)
    config["config_groups"]["group_0"]["weights"].update(weights)
    configure(path, quantization_config=config)
    plan = plan_model(path, ModelConfig(device="cpu", dtype="float32"))
    message = rf"size 4 cuts model.layers.0.self_attn.o_proj into 128 columns each, which {reason} of compressed-ten"
    with pytest.raises(UnsupportedFeature, match=rf"{message}.* does not allow; .* are {sizes}$"):
        plan.check_ranks(4)
