"""Quantizing at load: bitsandbytes' codes and scales bit for bit, each rank's those of the whole; what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors.torch import load_file, save_file

from loraplex.commands.settings import QUANTIZATIONS
from loraplex.config import ModelConfig
from loraplex.errors import InvalidModel, UnsupportedFeature
from loraplex.models.assemble import Runtime
from loraplex.models.loader import load_model, plan_model
from loraplex.quant.at_load import fp8_blocks
from loraplex.quant.base import WHOLE, Matrix, Slab
from loraplex.quant.formats import LOAD_FORMATS, NONE
from loraplex_kernels.attention.reference import ReferenceAttention
from loraplex_kernels.lora.reference import ReferenceLora
from loraplex_kernels.quant.packing import unpack
from loraplex_kernels.quant.stored import StoredMatrix, decode
from tests.quant.cases import configure, dense_base, quantized
from tests.quant.packers import bnb as packers
from tests.quant.packers import library
from tests.tiny import load_tiny, tiny_checkpoint

#: two blocks of rows go through, the second one smaller
ROWS, COLUMNS = 300, 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("at-load")


class OneTensor:
    """A checkpoint of one matrix (``WeightReader``)."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.matrix = Matrix("m", *tensor.shape)
        self._tensor = tensor

    def keys(self) -> frozenset[str]:
        return frozenset({self.matrix.key})

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensor.shape)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensor.dtype

    def tensor(self, key: str, rows: slice = WHOLE, cols: slice = WHOLE) -> torch.Tensor:
        return self._tensor[rows, cols]


def weights(dtype: torch.dtype) -> torch.Tensor:
    """Large and small, with ties between two codes, blocks and a row of zeros, and a row in which all are the same."""
    made = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)) * 0.05
    made[1] = 0
    made[2, 64:192] = 0
    made[3] = 0.25
    for row, values in {4: packers.table("nf4"), 5: packers.table("fp4").sort().values}.items():
        made[row, :15] = (values[:-1] + values[1:]) / 2
        made[row, 15] = 1
    made[6] = torch.linspace(-127, 127, COLUMNS).round() / 2
    made[7] *= 1e-4
    made[8, ::2] = -0.0
    return made.to(dtype)


def read(name: str, dense: torch.Tensor, rows: slice = WHOLE, cols: slice = WHOLE) -> StoredMatrix:
    reader, (height, width) = OneTensor(dense), dense.shape
    slab = Slab(reader.matrix, slice(*rows.indices(height)[:2]), slice(*cols.indices(width)[:2]))
    return LOAD_FORMATS[name]().read(reader, slab)


def codes(stored: StoredMatrix) -> torch.Tensor:
    return unpack(stored.codes, stored.shape[1], stored.scheme.values.bits)


@by_dtype
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bits_are_those_of_bitsandbytes(kind: str, dtype: torch.dtype) -> None:
    dense = weights(dtype)
    packed, state = bnb.quantize_4bit(dense, blocksize=64, quant_type=kind)
    stored = read(kind, dense)
    pairs = packed.view(ROWS, -1)
    assert torch.equal(codes(stored), torch.stack((pairs >> 4, pairs & 15), 2).flatten(1))
    assert torch.equal(stored.scales.tensors[0].flatten(), state.absmax)
    assert torch.equal(decode(stored, torch.float32), bnb.dequantize_4bit(packed, state).float())
    assert len(codes(stored).unique()) >= 15


@by_dtype
def test_int8_is_that_of_bitsandbytes(dtype: torch.dtype) -> None:
    dense = weights(dtype)
    stored, full = read("int8", dense), torch.arange(ROWS) != 1
    found, scales, _ = bnb.int8_vectorwise_quant(dense[full])
    assert torch.equal(codes(stored).view(torch.int8)[full], found)
    assert torch.equal(stored.scales.tensors[0].flatten()[full], scales)
    assert torch.equal(decode(stored, torch.float32)[full], bnb.int8_vectorwise_dequant(found, scales))
    # where bitsandbytes divides by zero
    assert torch.equal(decode(stored, torch.float32)[1], torch.zeros(COLUMNS))


@by_dtype
def test_fp8_has_a_scale_a_row_and_the_nearest_codes(dtype: torch.dtype) -> None:
    dense = weights(dtype).float()
    stored = read("fp8", weights(dtype))
    scales = stored.scales.tensors[0]
    assert torch.equal(scales, dense.abs().amax(1, keepdim=True) / 448)
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]
    scaled = dense[2:9] / scales[2:9]
    nearest = (scaled.unsqueeze(2) - numbers).abs().amin(2)
    found = codes(stored)[2:9].contiguous().view(torch.float8_e4m3fn).float()
    assert torch.equal((scaled - found).abs(), nearest)
    assert torch.equal(decode(stored, torch.float32)[1], torch.zeros(COLUMNS))


@by_dtype
def test_fp8_in_blocks_is_that_of_transformers(dtype: torch.dtype) -> None:
    dense = weights(dtype)[:256].clone()
    dense[128:, 256:384] = 0
    dense[:128, 384:] *= 1e-3
    stored = fp8_blocks().quantized("m.weight", dense)
    expected = library.stored("fp8", "m", dense)
    assert torch.equal(codes(stored), expected["m.weight"].view(torch.uint8))
    assert torch.equal(stored.scales.tensors[0], expected["m.weight_scale_inv"])


def test_fp8_in_blocks_is_finite_where_the_weights_are() -> None:
    made = torch.randn(128, 512, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    for block, size in enumerate((2.0**-149, 1e-37, 1e-30, torch.finfo(torch.float32).max / 128)):
        made[:, block * 128 : block * 128 + 128] *= size
    decoded = decode(fp8_blocks().quantized("m.weight", made), torch.float32)
    bound = made.abs().unflatten(1, (4, 128)).amax((0, 2)).repeat_interleave(128)
    assert decoded.isfinite().all()
    assert bool(((decoded - made).abs() <= bound).all())
    for value in (float("nan"), float("inf")):
        made[5, 200] = value
        with pytest.raises(InvalidModel, match=r"'m\.weight' is not finite"):
            fp8_blocks().quantized("m.weight", made)


@pytest.mark.parametrize("name", LOAD_FORMATS)
def test_magnitudes_at_the_ends_of_float32_make_nothing_that_is_not_finite(name: str) -> None:
    # bitsandbytes multiplies a code of 127 by the scale before it divides
    tiny, huge = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max / 128
    sizes = torch.tensor([0.0, tiny * 2**-23, 670 * 2.0**-149, tiny, 1e-38, 1e-36, 1.0, huge]).unsqueeze(1)
    dense = torch.randn(8, 128, generator=torch.Generator().manual_seed(1)).clamp(-1, 1) * sizes
    decoded = decode(read(name, dense), torch.float32)
    assert decoded.isfinite().all()
    assert bool(((decoded - dense).abs() <= dense.abs().amax(1, keepdim=True) * 1.01).all())


@pytest.mark.parametrize("name", LOAD_FORMATS)
def test_a_slab_is_cut_out_of_the_whole(name: str) -> None:
    dense = weights(torch.bfloat16)
    whole = read(name, dense)
    for rows, cols in ((slice(0, 75), WHOLE), (WHOLE, slice(128, 256)), (slice(3, 200), slice(448, 512))):
        part = read(name, dense, rows, cols)
        assert torch.equal(codes(part), codes(whole)[rows, cols])
        assert torch.equal(decode(part, torch.float32), decode(whole, torch.float32)[rows, cols])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", LOAD_FORMATS)
def test_weights_that_are_not_finite_are_refused(name: str, value: float, root: Path, tmp_path: Path) -> None:
    tensors = load_file(dense_base(root) / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][511, 3] = value
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((dense_base(root) / "config.json").read_bytes())
    with pytest.raises(InvalidModel, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is not finite"):
        load_tiny(tmp_path, quantization=name)


def test_blocks_that_do_not_divide_the_inputs_are_refused(root: Path) -> None:
    path = tiny_checkpoint(root, "llama")
    with pytest.raises(UnsupportedFeature, match=r"q_proj: 32 inputs are no multiple of the 64 of a block of nf4"):
        load_tiny(path, quantization="nf4")
    assert load_tiny(path, quantization="int8").weight_bytes < load_tiny(path).weight_bytes


def test_ranks_cut_between_blocks(root: Path) -> None:
    plan = plan_model(dense_base(root), ModelConfig(device="cpu", quantization="nf4"))
    plan.check_ranks(4)
    narrow = tiny_checkpoint(root, "llama", hidden_size=64, intermediate_size=64, head_dim=16)
    with pytest.raises(UnsupportedFeature, match=r"16 columns each, which the block of 64 of nf4 does not allow"):
        plan_model(narrow, ModelConfig(device="cpu", quantization="nf4")).check_ranks(4)
    plan_model(narrow, ModelConfig(device="cpu", quantization="int8")).check_ranks(2)


@pytest.mark.parametrize("name", LOAD_FORMATS)
def test_the_ends_stay_dense(root: Path, name: str) -> None:
    model, dense = load_tiny(dense_base(root), quantization=name), load_tiny(dense_base(root))
    for site in ("model.embed_tokens", "lm_head"):
        assert torch.equal(model.dense_weight(site), dense.dense_weight(site))
    module = "model.layers.0.mlp.down_proj"
    assert not torch.equal(model.dense_weight(module), dense.dense_weight(module))


@by_dtype
def test_4_bits_are_rounded_to_the_checkpoint_s_dtype(root: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    """As transformers' are, which casts a checkpoint to the dtype that its config names first."""
    tensors = {key: value.to(dtype) for key, value in load_file(dense_base(root) / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((dense_base(root) / "config.json").read_bytes())
    configure(tmp_path, dtype=str(dtype).removeprefix("torch."))
    model = load_tiny(tmp_path, quantization="nf4")
    module = "model.layers.1.self_attn.o_proj"
    expected = bnb.dequantize_4bit(*bnb.quantize_4bit(tensors[f"{module}.weight"], blocksize=64, quant_type="nf4"))
    assert expected.dtype is dtype
    assert torch.equal(model.dense_weight(module), expected.float())


@pytest.mark.parametrize("name", LOAD_FORMATS)
def test_random_weights_from_a_config_alone(root: Path, name: str) -> None:
    model = load_tiny(dense_base(root), load_format="dummy", quantization=name)
    dense = load_tiny(dense_base(root), load_format="dummy")
    module = "model.layers.0.mlp.gate_proj"
    exact, found = dense.dense_weight(module), model.dense_weight(module)
    assert 0 < float((found - exact).std() / exact.std()) < 0.2


def test_progress_counts_the_bytes_of_the_checkpoint(root: Path) -> None:
    seen: list[tuple[int, int]] = []
    runtime = Runtime(ReferenceLora(), ReferenceAttention(), adapter_memory=1 << 20)
    plan = plan_model(dense_base(root), ModelConfig(device="cpu", quantization="nf4"))
    load_model(plan, runtime, lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in load_file(dense_base(root) / "model.safetensors").values())
    assert (seen[0], seen[-1]) == ((0, total), (total, total))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({done for done, _ in seen}) > 14


def test_a_quantized_checkpoint_is_not_quantized_again(root: Path) -> None:
    for name in ("nf4", "bnb-int8"):
        stored = plan_model(quantized(root, name), ModelConfig(device="cpu")).format.name
        with pytest.raises(UnsupportedFeature, match=rf"'fp8', but the checkpoint is quantized already, as {stored}"):
            load_tiny(quantized(root, name), quantization="fp8")


def test_the_command_line_allows_what_there_is() -> None:
    assert (NONE, *LOAD_FORMATS) == QUANTIZATIONS
