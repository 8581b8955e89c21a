"""Ranks that are processes and share memory: every adapter kind in one batch, a group that is not complete, and
one that is not of one mind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import psutil
import pytest
import torch

from loraplex.config import AdaptersConfig, Config, EngineConfig, ModelConfig, NodesConfig
from loraplex.engine.client import EngineClient, start_engine
from loraplex.engine.ranks import process
from loraplex.engine.ranks.digest import group_digest
from loraplex.engine.ranks.orders import RankStart
from loraplex.errors import GroupLost, InvalidConfig
from loraplex.parallel.distributed import DistributedGroup
from loraplex.parallel.rendezvous import Meeting, keep_store
from loraplex.types import Request
from tests.kind_matrix import KindMatrix
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rank-processes")


def config_of(base: Path, size: int, adapter_dir: Path) -> Config:
    return Config(
        model=ModelConfig(model=str(base), device="cpu", dtype="float32", threads=1, tensor_parallel_size=size),
        engine=EngineConfig(kv_cache_memory=1 << 21, max_num_batched_tokens=32, max_num_seqs=24, kv_page_size=4),
        adapters=AdaptersConfig(adapter_memory=1 << 24, adapter_dirs=(str(adapter_dir),)),
    )


def serve(config: Config, base: Path, use: Callable[[EngineClient], Awaitable[None]]) -> None:
    async def run() -> None:
        client = await start_engine(config, base, "tiny", lambda _: None)
        try:
            await use(client)
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(run(), 200))


async def tokens(engine: EngineClient, asked: Request) -> tuple[int, ...]:
    return tuple([token async for event in engine.generate(asked) for token in event.token_ids])


@pytest.mark.timeout(240)
def test_all_kinds_in_one_batch(kinds_root: Path) -> None:
    """Of two ranks; those of four, and of other models, are threads in ``test_ranks_kinds``."""
    size, matrix = 2, KindMatrix(kinds_root, "qwen3", tied=True)
    paths = {name: matrix.adapter(name) for name in matrix.names}
    cases = list(matrix.all_cases())

    async def use(engine: EngineClient) -> None:
        assert engine.model.tensor_parallel_size == size
        assert len(psutil.Process(engine.pid).children()) == size - 1
        await asyncio.gather(*(engine.load_adapter(name, str(path)) for name, path in paths.items()))
        got = await asyncio.gather(*(tokens(engine, case.request) for case in cases))
        wrong = {
            case.request.request_id: (found, case.expected)
            for case, found in zip(cases, got, strict=True)
            if found != case.expected
        }
        assert not wrong

    serve(config_of(matrix.base_dir, size, kinds_root), matrix.base_dir, use)


def test_a_rank_that_never_comes_is_waited_for_so_long_and_no_longer() -> None:
    kept = keep_store("127.0.0.1", 0, 2, 1.0)
    began = time.monotonic()
    with pytest.raises(GroupLost, match=r"rank 0 of 2 did not find the others at 127\.0\.0\.1:\d+ within 1 s"):
        DistributedGroup(kept.meeting(0, 2, 1.0), torch.device("cpu"), kept.store)
    assert time.monotonic() - began < 10.0


def test_a_store_that_is_not_there_is_named() -> None:
    with pytest.raises(GroupLost, match=r"rank 1 of 2 did not find the others at 127\.0\.0\.1:1 within 1 s"):
        DistributedGroup(Meeting("127.0.0.1", 1, 1, 2, 1.0), torch.device("cpu"))


def test_ranks_that_would_compute_other_things_have_other_digests(root: Path) -> None:
    one, other = tiny_checkpoint(root, "llama"), tiny_checkpoint(root, "llama", rms_norm_eps=1e-3)
    config = config_of(one, 2, root)
    assert group_digest(config, one) == group_digest(config_of(other, 2, root), one)  # where it lies is not what it is
    wider = msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, dtype="bfloat16"))
    paged = msgspec.structs.replace(config, engine=msgspec.structs.replace(config.engine, kv_page_size=8))
    assert len({group_digest(*each) for each in ((config, one), (config, other), (wider, one), (paged, one))}) == 4


def test_a_rank_with_another_model_is_refused(root: Path) -> None:
    """Its digest is not the one that it is told of."""
    base = tiny_checkpoint(root, "llama")
    start = RankStart(config_of(base, 2, root), str(base), Meeting("127.0.0.1", 1, 1, 2, 1.0), "", "", "another")
    with pytest.raises(InvalidConfig, match="rank 1 of 2 has other code, or another model"):
        process._parts(start, None, None)  # type: ignore[arg-type]


def test_each_rank_of_a_machine_takes_a_gpu_of_its_own(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With four GPUs that torch only believes in: the sixth rank of eight is the second on the second machine."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: current.__setitem__(0, index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    base = tiny_checkpoint(root, "llama")
    model = ModelConfig(model=str(base), device="cuda", tensor_parallel_size=8)
    config = Config(model=model, nodes=NodesConfig(nnodes=2, rdzv_endpoint="first:1"))
    start = RankStart(config, str(base), Meeting("first", 1, 5, 8, 1.0), "", "", group_digest(config, base))
    parts = process._parts(start, None, None)  # type: ignore[arg-type]
    assert parts.plan.placement.device == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(
        InvalidConfig, match="puts 4 ranks on each machine and each takes a GPU of its own; this machine has 3"
    ):
        process._parts(start, None, None)  # type: ignore[arg-type]
