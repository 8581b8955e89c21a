"""While a rank loads, its memory never exceeds its share of the weights by more than one tensor's slice, whether they
are kept as they are or quantized on the way."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from loraplex.config import ModelConfig
from loraplex.models.loader import ModelPlan, plan_model
from loraplex.parallel.shard import Shard
from tests.loading_memory import LoadingMemory
from tests.servers import environment

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/self/status of Linux")


def config(vocab_size: int, hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int) -> LlamaConfig:
    """Of a model in float32."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        dtype="float32",
    )


#: 210 MiB, a ninth of it in each end of the vocabulary
CONFIG = config(8192, 768, 2048, 6, 12)
#: of the same kind, 3 MiB
SMALL = config(256, 256, 512, 1, 4)
#: for all that is no weight: threads, what the heap keeps, rounding to pages
MARGIN_BYTES = 4 << 20


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Path]:
    """One a checkpoint too large to be kept like other folders of tests, and ``SMALL`` below it."""
    with tempfile.TemporaryDirectory(prefix="loraplex-test-") as folder:
        path = Path(folder)
        for made, place in ((CONFIG, path), (SMALL, path / "small")):
            made.save_pretrained(place)
            spec = plan_model(place, ModelConfig(device="cpu")).spec
            tensors = {key: torch.randn(shape) for key, shape in spec.tensors().items()}
            save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        yield path


@pytest.mark.parametrize(
    ("quantization", "rank", "size"),
    [("none", 1, 2), ("none", 0, 4), ("nf4", 0, 1), ("int8", 1, 2)],
)
def test_the_peak_is_a_rank_s_share_and_one_slice(checkpoint: Path, quantization: str, rank: int, size: int) -> None:
    """Of memory that no file backs, in a process of its own; nothing of the peak is left but the weights."""
    plan = plan_model(checkpoint, ModelConfig(device="cpu", quantization=quantization))
    shards = {site.name: site.cut.shard for site in plan.spec.sites()}
    dense = {key: prod(shape) * 4 for key, shape in plan.spec.tensors().items()}
    kept = {matrix.key: plan.format.nbytes(matrix) or dense[matrix.key] for matrix in plan.spec.matrices().values()}

    def of_rank(key: str, whole: int) -> int:
        return whole if shards[key.rpartition(".")[0]] is Shard.REPLICATED else whole // size

    share = sum(of_rank(key, kept.get(key, whole)) for key, whole in dense.items())
    largest = max(of_rank(key, whole) for key, whole in dense.items())
    assert share > 5 * MARGIN_BYTES
    used = load(plan, quantization, rank, size)
    assert used.held == pytest.approx(share, rel=0.01)
    assert share - MARGIN_BYTES < used.after < share + MARGIN_BYTES
    assert used.peak < share + largest + MARGIN_BYTES


def load(plan: ModelPlan, quantization: str, rank: int, size: int) -> LoadingMemory:
    places = [str(plan.path), str(plan.path / "small")]
    command = [sys.executable, "-m", "tests.loading_memory", *places, quantization, str(rank), str(size)]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, check=True, timeout=120)
    return msgspec.convert(json.loads(done.stdout), LoadingMemory)
