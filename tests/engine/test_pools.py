"""Pools out of one budget: what is divided is never more than there is, and what does not fit is refused in numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex.engine import rank as engine_rank
from loraplex.engine.memory import Available
from loraplex.engine.pools import Costs, Demand, PoolSizes, divide
from loraplex.errors import InvalidConfig
from loraplex.types import Request, StopRule
from tests.engines import local_engine
from tests.tiny import prompt, tiny_checkpoint


@given(
    st.integers(0, 1 << 20),
    st.sampled_from([(0, 700), (300, 0), (300, 700), (700, 3), (3, 700)]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
)
def test_what_is_divided_fits_and_is_of_use(
    more: int, costs: tuple[int, int], max_num_seqs: int, pages_each: int, prefix_cache: bool
) -> None:
    cost, demand = Costs(*costs), Demand(max_num_seqs, pages_each, prefix_cache)
    budget = cost.least_bytes + more
    sizes = divide(budget, cost, demand)
    assert sum(share.nbytes for share in cost.shares(sizes)) <= budget
    assert 2 <= sizes.num_pages <= max(demand.num_pages, 2)
    running = sizes.max_num_seqs(max_num_seqs)
    assert 1 <= running <= max_num_seqs
    assert bool(sizes.num_slots) == bool(cost.slot_bytes)
    assert prefix_cache or sizes.num_slots <= max_num_seqs


def test_running_sequences_come_first_and_a_quarter_of_the_rest_is_for_snapshots() -> None:
    both = Costs(page_bytes=10, slot_bytes=100)
    assert divide(10_000, both, Demand(20, 1000)) == PoolSizes(num_pages=600, num_slots=20 + 20)
    assert divide(10_000, both, Demand(20, 1000, prefix_cache=False)) == PoolSizes(800, 20)
    assert divide(10_000, both, Demand(80, 1000)) == PoolSizes(375, 50 + 12), "half of it for those that run"
    assert divide(10_000, both, Demand(20, 5)) == PoolSizes(101, 20 + 69), "pages that nobody could use are snapshots"
    assert divide(10_000, Costs(0, 100), Demand(20, 1000)) == PoolSizes(20_001, 100), "pages without memory"
    assert divide(10_000, Costs(10, 0), Demand(20, 1000)) == PoolSizes(1000, 0)


def test_ranks_agree_on_what_both_have() -> None:
    assert PoolSizes(7, 3).least(PoolSizes(5, 4)) == PoolSizes(5, 3)


@pytest.mark.parametrize(
    ("arch", "kv_cache_memory", "message"),
    [
        ("mamba2", 11_263, r"the states of one sequence, 11264 bytes \(--kv-cache-memory 11264\)"),
        ("bamba", 12_287, r"one sequence, 11264 bytes and 2 pages of 512 bytes \(--kv-cache-memory 12288\)"),
    ],
)
def test_a_budget_without_room_for_one_sequence(tmp_path: Path, arch: str, kv_cache_memory: int, message: str) -> None:
    base = tiny_checkpoint(tmp_path, arch)
    with pytest.raises(InvalidConfig, match=message):
        local_engine(base, kv_page_size=4, kv_cache_memory=kv_cache_memory)
    engine = local_engine(base, kv_page_size=4, kv_cache_memory=kv_cache_memory + 1)
    info = engine.core.model_info
    assert (info.state_num_slots, info.max_num_seqs) == (1, 1)
    if arch == "bamba":
        assert (info.kv_num_pages, info.max_model_len) == (2, 4)
    requests = [Request(f"r{seed}", prompt(2, seed=seed), stop=StopRule(max_tokens=2)) for seed in range(3)]
    assert all(got.failure is None for got in engine.generate(requests)), "one after the other"


def test_a_model_whose_smallest_states_do_not_fit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_checkpoint(tmp_path, "bamba")
    monkeypatch.setattr(engine_rank, "available_memory", lambda device: Available(100, "this machine"))
    monkeypatch.setattr(engine_rank, "load_model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InvalidConfig, match=r"BambaForCausalLM in float32 needs .*2 KV pages .*1 state 0\.01 MiB"):
        local_engine(base, kv_page_size=16)


def test_a_server_says_what_it_has_of_states(tmp_path: Path) -> None:
    engine = local_engine(tiny_checkpoint(tmp_path, "mamba2"), kv_cache_memory=10 * 11_264, max_num_seqs=4)
    info = engine.core.model_info
    assert (info.state_num_slots, info.state_slot_bytes, info.max_num_seqs) == (10, 11_264, 4)
    assert {op for op in info.backends if op != "graphs"} == {"lora", "conv", "ssd"}
    ticket = engine.submit(Request("r", prompt(20), stop=StopRule(max_tokens=30, ignore_eos=True)))
    while len(engine.generations[ticket].token_ids) < 20:
        engine.turn()
    report = engine.reports[-1]
    assert (report.state_slots_used, report.state_slots_cached, report.state_slots_free) == (1, 2, 7)


def test_backends_of_state_space_layers_are_those_asked_for(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path, "mamba2")
    with pytest.raises(InvalidConfig, match="conv backend 'none' cannot run: there is no such backend"):
        local_engine(base, conv_backend="none")
    with pytest.raises(InvalidConfig, match="ssd backend 'none' cannot run: there is no such backend"):
        local_engine(base, ssd_backend="none")
