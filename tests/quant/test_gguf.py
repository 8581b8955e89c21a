"""GGUF's own blocks: each type bit for bit, what shares what, where they may be cut, what is dequantized instead."""

from __future__ import annotations

import logging
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from loraplex.config import ModelConfig
from loraplex.errors import UnsupportedFeature
from loraplex.models.footprint import weight_shares
from loraplex.models.loader import plan_model
from loraplex.quant.base import WHOLE, Matrix
from loraplex.quant.gguf import BLOCK_TYPES, GgufFormat
from loraplex_kernels.quant.stored import decode
from tests.quant.cases import DIMENSIONS, dense_base, quantized
from tests.quant.packers.gguf import write_gguf
from tests.quant.tensor_reader import TensorReader, read
from tests.tiny import load_tiny, tiny_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_any_bytes_are_the_weights_of_the_library(kind: str) -> None:
    """Every code, scale and sign; whole, and cut by rows and columns; nothing keeps the file's memory."""
    block, rows, columns = BLOCK_TYPES[kind], 5, 1024
    assert (block.columns, block.nbytes) == GGML_QUANT_SIZES[Kind[kind]]
    generator = np.random.default_rng(1)
    data = generator.integers(0, 256, (rows, columns // block.columns, block.nbytes), np.uint8)
    for first in {"Q4_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2)}.get(kind, (0,)):
        floats = generator.normal(0, 0.01, data.shape[:2]).astype(np.float16)
        data[:, :, first : first + 2] = floats[:, :, None].view(np.uint8)
    data = data.reshape(rows, -1)
    expected = torch.from_numpy(gguf.quants.dequantize(data, Kind[kind]))
    matrix = Matrix("m", rows, columns)
    form = GgufFormat(kind, {"m": kind})
    reader = TensorReader({f"blocks.{kind}": torch.from_numpy(data)}, "m")
    theirs = reader.tensor(f"m.blocks.{kind}").untyped_storage().data_ptr()
    one = slice(block.columns, 2 * block.columns)
    for row, col in ((WHOLE, WHOLE), (slice(1, 4), slice(256, 768)), (slice(4, 5), one)):
        stored = read(form, reader, matrix, row, col)
        assert torch.equal(decode(stored, torch.float32), expected[row, col])
        storages = [one.untyped_storage() for one in (stored.codes, *stored.scales.tensors)]
        assert theirs not in [storage.data_ptr() for storage in storages]
        assert sum(storage.nbytes() for storage in storages) == stored.nbytes
    assert form.nbytes(matrix) == read(form, reader, matrix).nbytes


def test_a_tied_head_shares_the_embeddings_blocks(root: Path) -> None:
    checkpoint = tiny_checkpoint(root, "llama", **DIMENSIONS, tie_word_embeddings=True)
    file = write_gguf(checkpoint, root / "tied.gguf", choose=lambda name: Kind.Q8_0)
    model = load_tiny(file)
    embedding = model._parts.embedding.weight
    assert model._parts.head.weight is embedding
    nbytes = 96 * 512 // 32 * 34
    assert embedding.nbytes == nbytes
    plan = plan_model(file, ModelConfig(device="cpu", dtype="float32"))
    assert plan.format.name == "gguf-q8_0"
    shares = weight_shares(plan.spec, plan.placement, plan.format)
    assert [share.nbytes for share in shares if share.what in ("embedding", "head")] == [nbytes]
    assert sum(share.nbytes for share in shares) == model.weight_bytes


def test_each_matrix_is_estimated_in_its_own_type(root: Path) -> None:
    plan = plan_model(quantized(root, "gguf-q4_k"), ModelConfig(device="cpu", dtype="float32"))
    assert plan.format.name == "gguf-q4_k"
    model = load_tiny(quantized(root, "gguf-q4_k"))
    shares = weight_shares(plan.spec, plan.placement, plan.format)
    assert sum(share.nbytes for share in shares) == model.weight_bytes


@pytest.mark.parametrize("quantization", ["", "none"])
def test_a_cut_within_a_block_is_refused(root: Path, quantization: str) -> None:
    config = ModelConfig(device="cpu", dtype="float32", quantization=quantization)
    plan = plan_model(quantized(root, "gguf-q4_k"), config)
    with pytest.raises(
        UnsupportedFeature,
        match=r"tensor_parallel_size 4 cuts \S+o_proj into 128 columns each, which the Q4_K block of 256 of gguf-q4_k "
        r"does not allow; sizes that fit are 1, 2$",
    ):
        plan.check_ranks(4)


def test_types_that_have_no_products_are_dequantized_with_a_warning(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def choose(name: str) -> Kind:
        return {"v_proj": Kind.Q5_0, "down_proj": Kind.Q5_1, "embed_tokens": Kind.F16}.get(
            name.split(".")[-2], Kind.Q4_0
        )

    file = write_gguf(dense_base(root), root / "mixed.gguf", choose=choose)
    model = load_tiny(file)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(file) in warning.getMessage()
    assert warning.getMessage().endswith("dequantized, and take the memory of dense ones: 2 of Q5_0, 2 of Q5_1")
    plan = plan_model(file, ModelConfig(device="cpu", dtype="float32"))
    assert plan.format.name == "gguf-q4_0"
    shares = weight_shares(plan.spec, plan.placement, plan.format)
    assert sum(share.nbytes for share in shares) == model.weight_bytes
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for module, theirs in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down")):
        tensor = tensors[f"blk.1.{theirs}.weight"]
        dense = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(model.dense_weight(f"model.layers.1.{module}"), dense)


def test_a_file_of_numbers_alone_is_dense(root: Path) -> None:
    file = write_gguf(dense_base(root), root / "dense.gguf", choose=lambda name: Kind.F16)
    assert plan_model(file, ModelConfig(device="cpu", dtype="float32")).format.name == "none"
