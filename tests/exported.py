"""Exports of an engine in this thread, and what transformers and PEFT make of them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from loraplex.engine.local import LocalEngine
from loraplex.types import AdapterRef, ExportFormat, MergeOptions
from tests.engines import local_engine
from tests.kind_matrix import KindMatrix
from tests.oracle import Alone


def exporting_engine(matrix: KindMatrix, out: Path, **options: object) -> LocalEngine:
    """An engine on a matrix's base that may export to ``out``."""
    out.mkdir(exist_ok=True)
    return local_engine(matrix.base_dir, adapter_dirs=(matrix.root, out), export_dirs=(out,), **options)  # type: ignore[arg-type]


def load(engine: LocalEngine, matrix: KindMatrix, *names: str) -> None:
    """Adapters of a matrix under their own names."""
    for name in names:
        engine.load_adapter(name, str(matrix.adapter(name)))


def merge(engine: LocalEngine, name: str, inputs: dict[str, float], **options: object) -> None:
    """A merge of loaded adapters."""
    refs = [AdapterRef(one, weight) for one, weight in inputs.items()]
    engine.merge_adapters(name, refs, MergeOptions(**{"method": "cat", **options}))  # type: ignore[arg-type]


def merged(engine: LocalEngine, name: str, out: Path, max_shard_bytes: int = 0) -> Alone:
    """The base with an adapter folded in, exported, as transformers loads it and nothing else."""
    engine.export_adapter(name, f"{name}-merged", ExportFormat.MERGED, max_shard_bytes)
    return Alone(loaded(out / f"{name}-merged"))


def loaded(path: Path) -> torch.nn.Module:
    """A checkpoint in transformers, of which every tensor has its place and every place a tensor."""
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    module: torch.nn.Module = model
    return module
