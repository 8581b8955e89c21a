"""State-space models over ranks, through the engine: adapters of every part of a mixer, lowered once, sent to all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import peft
import pytest

from loraplex.engine.local import LocalEngine
from tests.adapters.peft_saved import SavedCase, lora, make
from tests.engines import local_engine, mixed_requests
from tests.ranks import ranked_engine
from tests.tiny import tiny_checkpoint

OPTIONS = {"max_num_batched_tokens": 64, "max_num_seqs": 12, "kv_cache_memory": 16 << 20}
#: those that the requests name
ADAPTERS: Mapping[str, Callable[[], peft.PeftConfig]] = {
    "all": lora(target_modules="all-linear", exclude_modules=["out_proj"]),
    "attention": lora(target_modules=["in_proj"], modules_to_save=["conv1d", "norm"]),
    "one": lora(target_modules=["lm_head"], modules_to_save=["layers.0.mixer"]),
    "patterned": lora(target_modules=["in_proj"], use_dora=True, bias="all"),
    "stabilized": lora(target_modules=["embeddings", "in_proj"]),
    "vocabulary": lora(target_modules=["in_proj"], modules_to_save=["embeddings"]),
}


def tokens(engine: LocalEngine, root: Path) -> list[list[int]]:
    """Of one batch in which every row has its own adapter, or none."""
    for name in ADAPTERS:
        engine.load_adapter(name, str(root / name))
    return [generation.token_ids for generation in engine.generate(mixed_requests(1))]


@pytest.mark.parametrize("size", [2, 4])
def test_tokens_are_those_of_one_rank(tmp_path: Path, size: int) -> None:
    base = tiny_checkpoint(tmp_path, "mamba2", n_groups=1 if size == 2 else 8, use_bias=True)
    for name, config in ADAPTERS.items():
        make(SavedCase(config), base, tmp_path / name)
    expected = tokens(local_engine(base, adapter_dirs=(tmp_path,), **OPTIONS), tmp_path)
    assert len({tuple(one) for one in expected}) > len(ADAPTERS)
    with ranked_engine(base, size, adapter_dirs=(tmp_path,), **OPTIONS) as ranked:
        assert tokens(ranked.engine, tmp_path) == expected
