"""Stand-ins for a model and its adapters: the sizes of the real thing, random values, nothing to download."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.limits.shapes import ModelShape
from bench.ops.shapes import LLAMA, TINY
from loraplex.adapters.facts import AdapterFacts
from loraplex.adapters.packed import PackedAdapter, Write
from loraplex.engine.loader import LoadJob
from loraplex.models.base import BaseModel
from loraplex.types import Coverage
from loraplex_kernels.lora import Factors, LoraTable, PartDelta, SlotDelta
from loraplex_kernels.testing import random_factors

POSITIONS = 4096


def shape_of(dry: bool) -> ModelShape:
    """What the check measures on: the models of the ops' benchmarks, of which a dry run takes one layer."""
    return replace(TINY.model, num_layers=1) if dry else LLAMA.model


def write_config(shape: ModelShape, folder: Path) -> Path:
    """Make ``folder`` a checkpoint for ``--load-format dummy``: config.json alone."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@dataclass(frozen=True, slots=True)
class DummyAdapters:
    """Adapters of every linear layer of a model. Sources are ``RANK/NUMBER``; equal ranks share one host copy.

    On the device each has memory of its own, as adapters of different content have.
    """

    model: BaseModel
    packed: dict[int, tuple[Write, ...]]

    def load(self, job: LoadJob) -> PackedAdapter:
        """What a loader's thread does for a source; takes a second or two for the first of a rank."""
        rank = int(job.source.split("/")[0])
        if rank not in self.packed:
            self.packed[rank] = random_writes(self.model, rank)
        writes = self.packed[rank]
        nbytes = sum(write.nbytes for write in writes)
        return PackedAdapter(AdapterFacts(job.source, "lora", rank, 0, nbytes, Coverage({}, {})), writes)


def random_writes(model: BaseModel, rank: int) -> tuple[Write, ...]:
    """Random factors of one rank for every table of a decoder layer's linears, packed. No slot holds them yet."""
    generator = torch.Generator().manual_seed(rank)
    tables = {id(ref.table): ref.table for site, ref in model.tables().items() if ".layers." in site}
    return tuple(
        Write(table, table.pack(_random_delta(table, rank, model.dtype, generator)))
        for table in tables.values()
        if table is not None
    )


def _random_delta(table: LoraTable, rank: int, dtype: torch.dtype, generator: torch.Generator) -> SlotDelta:
    def part(size: int) -> PartDelta:
        a, b = random_factors(rank, table.in_features, size, generator)
        return PartDelta(Factors(a.to(dtype), (b * 0.02).to(dtype)))

    return SlotDelta(tuple(part(size) for size in table.part_sizes))
