"""GPTQ: every property that checkpoints have, on single matrices and their slabs; what is refused, by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.config import ModelConfig
from loraplex.errors import InvalidModel, LoraplexError, UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.models.loader import ModelPlan, plan_model
from loraplex.quant import gptq
from loraplex.quant.base import Matrix, Slab
from loraplex.quant.formats import choose_format
from loraplex_kernels.quant.stored import StoredMatrix, decode
from tests.quant.cases import dense_base, quantized
from tests.quant.packers import gptq as packer
from tests.quant.packers.integers import Integers, Rounding, TensorReader, expected_weights
from tests.tiny import load_tiny, tiny_checkpoint

ROWS, COLUMNS = 48, 256
MATRIX = Matrix("model.layers.0.mlp.down_proj", ROWS, COLUMNS)
ROUNDINGS = {
    "4bit-g32": Rounding(4, 32, symmetric=True),
    "4bit-g128-asym-bf16": Rounding(4, 128, symmetric=False, dtype=torch.bfloat16),
    "4bit-g64-asym-f32": Rounding(4, 64, symmetric=False, dtype=torch.float32),
    "4bit-g32-asym-desc_act": Rounding(4, 32, symmetric=False, shuffled=True),
    "4bit-row-asym": Rounding(4, -1, symmetric=False),
    "8bit-g128": Rounding(8, 128, symmetric=True),
    "8bit-g64-asym-desc_act": Rounding(8, 64, symmetric=False, shuffled=True),
    "8bit-row": Rounding(8, -1, symmetric=True),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gptq")


def integers(rounding: Rounding) -> Integers:
    return rounding.round(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(5)) * 0.05, 1)


def section(rounding: Rounding, **values: object) -> ConfigFields:
    given = {"bits": rounding.bits, "group_size": rounding.group, "desc_act": rounding.shuffled}
    return ConfigFields({"quant_method": "gptq", "sym": rounding.symmetric, **given, **values})


def slab(rows: tuple[int, int] = (0, ROWS), cols: tuple[int, int] = (0, COLUMNS)) -> Slab:
    return Slab(MATRIX, slice(*rows), slice(*cols))


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("name", ROUNDINGS)
def test_a_matrix_is_that_of_the_packer(name: str, layout: str) -> None:
    rounding = ROUNDINGS[name]
    packed = integers(rounding)
    reader = TensorReader(MATRIX, packer.pack(packed, rounding.bits, layout))
    form = gptq.read_config(section(rounding, checkpoint_format=layout))
    form.check(MATRIX, reader)
    stored = form.read(reader, slab())
    assert torch.equal(decode(stored, torch.float32), packed.dense())
    assert (stored.order is not None) == rounding.shuffled
    # zeros that are all the same are not kept
    assert (stored.scales.zeros is None) == rounding.symmetric
    assert_own_memory(stored, reader)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_a_slab_is_cut_between_groups_and_anywhere_in_rows(name: str) -> None:
    rounding = ROUNDINGS[name]
    packed = integers(rounding)
    reader = TensorReader(MATRIX, packer.pack(packed, rounding.bits))
    form = gptq.read_config(section(rounding))
    grain = form.grain(MATRIX)
    expected_grain = COLUMNS if rounding.shuffled else 1 if rounding.group == -1 else rounding.group
    assert (grain.rows, grain.cols) == (1, expected_grain)
    # words hold 8 or 4 codes: neither rows nor, with one group, columns need to begin with a word
    cols = {COLUMNS: (0, COLUMNS), 1: (37, 202)}.get(grain.cols, (grain.cols, 2 * grain.cols))
    for rows in ((0, ROWS), (16, 32), (5, 29)):
        stored = form.read(reader, slab(rows, cols))
        assert torch.equal(decode(stored, torch.float32), packed.dense()[slice(*rows), slice(*cols)])
        assert_own_memory(stored, reader)


def assert_own_memory(stored: StoredMatrix, reader: TensorReader) -> None:
    files = {tensor.untyped_storage().data_ptr() for tensor in reader.tensors.values()}
    kept = [stored.codes, *stored.scales.tensors, *([] if stored.order is None else [stored.order])]
    for tensor in kept:
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().data_ptr() not in files
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_groups_of_inputs_need_not_be_written_down() -> None:
    rounding = ROUNDINGS["4bit-g32"]
    packed = integers(rounding)
    reader = TensorReader(MATRIX, packer.pack(packed, 4, g_idx=False))
    assert torch.equal(decode(gptq.read_config(section(rounding)).read(reader, slab()), torch.float32), packed.dense())


def test_desc_act_whose_groups_are_in_order_permutes_nothing() -> None:
    rounding = ROUNDINGS["4bit-g32"]
    reader = TensorReader(MATRIX, packer.pack(integers(rounding), 4))
    assert gptq.read_config(section(rounding, desc_act=True)).read(reader, slab()).order is None


def test_desc_act_of_one_group_is_cut_anywhere() -> None:
    form = gptq.read_config(section(ROUNDINGS["4bit-row-asym"], desc_act=True))
    assert form.grain(MATRIX).cols == 1
    assert f"{MATRIX.name}.g_idx" not in form.tensors(MATRIX, frozenset())


HARMLESS = (
    {"dynamic": {}, "pack_dtype": "int32", "is_marlin_format": False},
    {"dynamic": {"-:lm_head": {}}, "meta": {"quantizer": ["gptqmodel:7.7.0"]}, "rotation": None},
    {"checkpoint_format": "GPTQ", "format": "gptq_v2"},  # the older key has it
    {"format": "gptq", "damp_percent": 0.01, "static_groups": False, "true_sequential": True, "backend": "auto"},
)


@pytest.mark.parametrize("values", HARMLESS, ids=str)
def test_keys_that_change_nothing(values: dict[str, object]) -> None:
    base = gptq.read_config(section(ROUNDINGS["4bit-g32"]))
    assert base.name == "gptq-int4-g32"
    assert gptq.read_config(section(ROUNDINGS["4bit-g32"], **values)) == base


REFUSED: tuple[tuple[dict[str, object], str], ...] = (
    ({"bits": 3}, r"quantization_config\.bits 3 of gptq; supported are 4, 8"),
    ({"group_size": 48}, r"quantization_config\.group_size 48 of gptq; supported are -1, 32, 64, 128"),
    ({"group_size": 0}, r"quantization_config\.group_size 0 of gptq; supported are -1, 32"),
    ({"checkpoint_format": "marlin"}, r"checkpoint_format 'marlin' of gptq; supported are gptq, gptq_v2"),
    ({"format": "gptq_p"}, r"checkpoint_format 'gptq_p' of gptq; supported are gptq, gptq_v2"),
    ({"is_marlin_format": True}, r"is_marlin_format true of gptq; supported are the formats gptq, gptq_v2"),
    ({"pack_dtype": "int16"}, r"pack_dtype 'int16' of gptq; supported is int32"),
    ({"dynamic": {"-:lm_head": {}, "+:.*k_proj": {"bits": 8}}}, r"dynamic of gptq has '\+:\.\*k_proj'; supported"),
    ({"rotation": "hadamard"}, r"rotation 'hadamard' of gptq; supported is none"),
    ({"quant_method": "hqq"}, r"quant_method 'hqq'; supported are .*gptq, awq"),
)


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[str(values) for values, _ in REFUSED])
def test_configurations_we_lack(values: dict[str, object], message: str) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, **values}
    with pytest.raises(UnsupportedFeature, match=message):
        choose_format("", ConfigFields({"quantization_config": config}))


@pytest.mark.parametrize(("values", "message"), [({"bits": "4"}, r"\.bits is '4'"), ({"sym": 1}, r"\.sym is 1")])
def test_configurations_that_are_broken(values: dict[str, object], message: str) -> None:
    config = {"quant_method": "gptq", "bits": 4, **values}
    with pytest.raises(InvalidModel, match=message):
        choose_format("", ConfigFields({"quantization_config": config}))


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (48, 192, "down_proj: 192 inputs are no multiple of group_size 128 of gptq-int4-g128"),
        (44, 256, "down_proj: 44 outputs are no multiple of the 8 of a word of gptq-int4-g128"),
        (48, 252, "down_proj: 252 inputs are no multiple of the 8 of a word of gptq-int4-channel"),
    ],
)
def test_sizes_that_do_not_fit(rows: int, columns: int, message: str) -> None:
    form = gptq.read_config(section(Rounding(4, -1 if columns == 252 else 128, symmetric=True)))
    with pytest.raises(UnsupportedFeature, match=message):
        form.check(Matrix(MATRIX.name, rows, columns), TensorReader(MATRIX, {}))


def plan(path: Path) -> ModelPlan:
    return plan_model(path, ModelConfig(device="cpu", dtype="float32"))


def test_desc_act_is_refused_over_ranks_before_memory_is_taken(root: Path) -> None:
    planned = plan(quantized(root, "gptq-4bit-g32-desc_act"))
    planned.check_ranks(1)
    with pytest.raises(
        UnsupportedFeature,
        match=r"tensor_parallel_size 2 cuts \S+ into 256 columns each, which desc_act of gptq-int4-g32 does not allow;"
        r" sizes that fit are 1$",
    ):
        planned.check_ranks(2)


MODULE = "model.layers.1.mlp.down_proj"
Change = Callable[[dict[str, torch.Tensor]], None]


def _set(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({f"{MODULE}.{part}": change(tensors[f"{MODULE}.{part}"])})


def _first_is(group: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda g_idx: torch.cat((torch.tensor([group], dtype=torch.int32), g_idx[1:]))


SORTED, PLAIN = "gptq-4bit-g32-desc_act", "gptq-4bit-g128"
SPOILED: dict[str, tuple[str, Change, type[LoraplexError], str]] = {
    "too high": (SORTED, _set("g_idx", _first_is(16)), InvalidModel, r"g_idx' has group 16, allowed are 0 to 15"),
    "negative": (SORTED, _set("g_idx", _first_is(-1)), InvalidModel, r"g_idx' has group -1, allowed are 0 to 15"),
    "uneven": (
        SORTED,
        _set("g_idx", lambda g_idx: g_idx.clamp(min=1)),
        UnsupportedFeature,
        r"g_idx' has 0 inputs in group 0, supported is group_size 32 in each",
    ),
    "sorted all the same": (
        PLAIN,
        _set("g_idx", lambda g_idx: g_idx.flip(0)),
        InvalidModel,
        r"g_idx' is not i // 128, which it must be as desc_act is false",
    ),
    "no scales": (PLAIN, lambda tensors: tensors.pop(f"{MODULE}.scales"), InvalidModel, rf"lacks {MODULE}\.scales"),
    "no codes": (PLAIN, lambda tensors: tensors.pop(f"{MODULE}.qweight"), InvalidModel, rf"lacks {MODULE}\.qweight"),
    "no groups": (SORTED, lambda tensors: tensors.pop(f"{MODULE}.g_idx"), InvalidModel, rf"lacks {MODULE}\.g_idx"),
    "scales on their side": (
        PLAIN,
        _set("scales", lambda scales: scales.T.contiguous()),
        InvalidModel,
        r"scales' has shape \[512, 4\], config\.json calls for \[4, 512\]",
    ),
    "long zeros": (
        PLAIN,
        _set("qzeros", lambda zeros: zeros.long()),
        InvalidModel,
        r"qzeros' is torch\.int64, expected torch\.int32",
    ),
    "a bias": (
        PLAIN,
        lambda tensors: tensors.update({f"{MODULE}.bias": torch.eye(1, 512, dtype=torch.float16)[0]}),
        UnsupportedFeature,
        r"down_proj\.bias' is not zero, and the model has no bias there",
    ),
    "codes and a weight": (
        PLAIN,
        lambda tensors: tensors.update({f"{MODULE}.weight": torch.zeros(512, 512)}),
        InvalidModel,
        rf"holds {MODULE}\.weight, for which",
    ),
}


def spoil(checkpoint: Path, copy: Path, change: Change) -> Path:
    """A copy whose tensors are changed."""
    shutil.copytree(checkpoint, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize("what", SPOILED)
def test_tensors_that_cannot_be_are_named(root: Path, what: str, tmp_path: Path) -> None:
    case, change, error, message = SPOILED[what]
    with pytest.raises(error, match=message):
        load_tiny(spoil(quantized(root, case), tmp_path / "spoiled", change))


def test_biases_of_zeros_where_the_model_has_none_are_harmless(root: Path, tmp_path: Path) -> None:
    zero = torch.zeros(512, dtype=torch.float16)
    path = spoil(quantized(root, PLAIN), tmp_path / "biased", lambda tensors: tensors.update({f"{MODULE}.bias": zero}))
    assert torch.equal(load_tiny(path).dense_weight(MODULE), expected_weights(path)[MODULE])


def test_biases_that_the_model_has_are_its_own(tmp_path: Path) -> None:
    dense, path = tiny_checkpoint(tmp_path, "qwen2", hidden_size=64, intermediate_size=64), tmp_path / "biased"
    packer.checkpoint(Rounding(4, 32, symmetric=False))(dense, path)
    name = "model.layers.1.self_attn.k_proj"
    assert load_file(path / "model.safetensors")[f"{name}.bias"].any()
    assert torch.equal(load_tiny(path).dense_weight(name), expected_weights(path)[name])
    with pytest.raises(InvalidModel, match=rf"lacks {name}\.bias"):
        load_tiny(spoil(path, tmp_path / "spoiled", lambda tensors: tensors.pop(f"{name}.bias")))


def test_a_module_left_dense_stays_dense(root: Path, tmp_path: Path) -> None:
    dense = load_file(dense_base(root) / "model.safetensors")[f"{MODULE}.weight"]

    def leave(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors.pop(f"{MODULE}.{part}")
        tensors[f"{MODULE}.weight"] = dense

    path = spoil(quantized(root, PLAIN), tmp_path / "left", leave)
    model = load_tiny(path)
    assert torch.equal(model.dense_weight(MODULE), dense)
    other = MODULE.replace("down", "up")
    assert torch.equal(model.dense_weight(other), expected_weights(path)[other])


def test_the_head_may_be_quantized_too(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "head"
    packer.checkpoint(Rounding(4, 128, symmetric=False), lm_head=True)(dense_base(root), path)
    model, planned = load_tiny(path), plan(path)
    assert torch.equal(model.dense_weight("lm_head"), expected_weights(path)["lm_head"])
    ends = {matrix.name: planned.format.nbytes(matrix) for matrix in planned.spec.matrices().values() if matrix.end}
    # 96 x 512 codes of half a byte; a scale and a zero for each of four groups
    assert ends == {"model.embed_tokens": None, "lm_head": 96 * (512 // 2 + 4 * 3)}
