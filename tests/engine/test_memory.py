"""What does not fit is refused before it is loaded, in numbers; what might fit is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraplex.config import ModelConfig
from loraplex.engine import pools
from loraplex.engine import rank as engine_rank
from loraplex.engine.memory import Available, available_memory, host_memory, require, reservable_memory
from loraplex.errors import InvalidConfig, OverCapacity
from loraplex.models import loader
from loraplex.models.footprint import Share, weight_shares
from loraplex.models.loader import plan_model
from loraplex.quant.base import Placement
from loraplex.quant.dense import DenseFormat, packs
from tests.engines import local_engine
from tests.tiny import load_tiny, tiny_checkpoint

CPU = torch.device("cpu")
MEMINFO = "MemTotal:  24000000 kB\nMemFree:  1000 kB\nMemAvailable:    8000 kB\nSwapFree:  500 kB\nHugePages: 0\n"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("memory"), "qwen3", tie_word_embeddings=request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_is_what_loading_takes(checkpoint: Path, dtype: str) -> None:
    plan = plan_model(checkpoint, ModelConfig(device="cpu", dtype=dtype))
    estimate = sum(share.nbytes for share in weight_shares(plan.spec, plan.placement, plan.format))
    taken = load_tiny(checkpoint, dtype=dtype).weight_bytes
    assert estimate <= taken
    if not packs(plan.placement):  # packed forms are padded
        assert estimate == taken


def test_a_tied_head_on_a_gpu_is_the_embedding(checkpoint: Path) -> None:
    spec = plan_model(checkpoint, ModelConfig(device="cpu")).spec
    shares = {
        s.what: s.nbytes for s in weight_shares(spec, Placement(torch.device("cuda", 0), torch.bfloat16), DenseFormat())
    }
    assert shares["embedding"] == 96 * 32 * 2
    assert shares.get("head", 0) == (0 if spec.tied else 96 * 32 * 2)
    assert set(shares) - {"head"} == {"embedding", "2 layers"}


def test_a_model_that_cannot_fit_is_refused_before_it_is_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_rank, "available_memory", lambda device: Available(20_000, "cuda:0"))
    monkeypatch.setattr(loader, "assemble", lambda materials: pytest.fail("weights were read"))
    with pytest.raises(
        InvalidConfig,
        match=r"Qwen3ForCausalLM in float32 needs at least 0\.\d+ MiB \(embedding 0\.01 MiB, 2 layers 0\.\d+ MiB, "
        r"(head 0\.01 MiB, )?2 KV pages 0\.\d+ MiB\); 0\.02 MiB are free on cuda:0: serve a smaller model, in a "
        r"narrower --dtype",
    ):
        local_engine(checkpoint)


def test_budgets_that_cannot_all_be_kept_are_refused_after_the_weights(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "reservable_memory", lambda device: Available(66 << 20, "cuda:0"))
    settings = {"kv_cache_memory": 1 << 20, "max_num_seqs": 8}
    local_engine(checkpoint, **settings, adapter_memory=64 << 20)
    with pytest.raises(
        InvalidConfig,
        match=r"beside 0 MiB of weights, this configuration needs at least 67 MiB \(KV cache \d\.\d+ MiB, "
        r"adapters 66 MiB, logits 0\.00 MiB\); 66 MiB are free on cuda:0: lower --kv-cache-memory, --adapter-memory",
    ):
        local_engine(checkpoint, **settings, adapter_memory=66 << 20)


def test_memory_that_runs_out_all_the_same(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(engine_rank, "load_model", load)
    with pytest.raises(OverCapacity, match=r"out of memory while loading the weights: CUDA out of memory.*--max-num"):
        local_engine(checkpoint)


def test_exactly_enough_is_enough() -> None:
    shares = (Share("a", 60), Share("b", 40))
    require(shares, Available(100, "here"), "it", "no")
    require(shares, None, "it", "no")
    with pytest.raises(InvalidConfig):
        require(shares, Available(99, "here"), "it", "no")


def test_memory_of_this_machine() -> None:
    found = available_memory(CPU)
    assert found is not None
    assert found.nbytes > 1 << 20
    assert reservable_memory(CPU) is None  # a CPU's pages are taken as they are written to


def test_the_machine_without_a_limit(tmp_path: Path) -> None:
    assert host_memory(_write(tmp_path / "meminfo", MEMINFO), tmp_path) == Available(8500 * 1024, "this machine")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "3000000", "memory.current": "2500000"}, 500_000),
        ({"memory.max": "3000000", "memory.current": "2500000", "memory.stat": "anon 7\nactive_file 30"}, 500_030),
        ({"memory.max": "2000000", "memory.current": "2500000"}, 0),
        ({"memory.max": "max", "memory.current": "2500000"}, None),
        ({"memory.max": "99999999999", "memory.current": "0"}, None),
        (
            {
                "memory/memory.limit_in_bytes": "3000000",
                "memory/memory.usage_in_bytes": "2000000",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 100000\ntotal_active_file 50000",
            },
            1_150_000,
        ),
        ({"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "0"}, None),
    ],
)
def test_a_containers_limit(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    """Swap comes on top of it: a limit of the container's memory is none of its swap."""
    meminfo = _write(tmp_path / "meminfo", MEMINFO)
    for name, text in files.items():
        _write(tmp_path / "cgroup" / name, text)
    found = host_memory(meminfo, tmp_path / "cgroup")
    swap = 500 * 1024
    assert found == (Available(8000 * 1024 + swap, "this machine") if expected is None else _container(expected + swap))


def test_no_linux_no_opinion(tmp_path: Path) -> None:
    assert host_memory(tmp_path / "nothing", tmp_path) is None


def _container(nbytes: int) -> Available:
    return Available(nbytes, "this container")


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
