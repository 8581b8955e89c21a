"""Engines over several ranks give the tokens of one rank, with no sum more than the base needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines import local_engine, make_adapters, mixed_requests
from tests.ranks import ranked_engine
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_ranks_give_the_tokens_of_one(root: Path, arch: str, size: int) -> None:
    base = tiny_checkpoint(root, arch)
    adapters = make_adapters(base, root / arch)
    options = {"adapter_dirs": (root / arch,), "max_num_batched_tokens": 32, "max_num_seqs": 8, "kv_page_size": 4}
    alone = local_engine(base, **options)
    for name, path in adapters.items():
        alone.load_adapter(name, str(path))
    expected = [g.token_ids for g in alone.generate(mixed_requests(1))]
    with ranked_engine(base, size, **options) as ranked:
        for name, path in adapters.items():
            ranked.engine.load_adapter(name, str(path))
        assert [g.token_ids for g in ranked.engine.generate(mixed_requests(1))] == expected
        assert len({tuple(calls.items()) for calls in ranked.meeting.calls}) == 1
