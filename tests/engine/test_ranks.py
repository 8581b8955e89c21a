"""Engines over several ranks give the tokens of one rank, with no sum more than the base needs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from loraplex.engine.local import LocalEngine
from loraplex.errors import GroupLost, InvalidAdapter
from loraplex.models.sites import SiteKind
from loraplex.parallel.runs import take
from loraplex.parallel.shard import Shard
from loraplex.types import AdapterRef, OnConflict, Request, StopRule
from loraplex_kernels.lora.reference import ReferenceTable
from tests.engines import local_engine, make_adapters, mixed_requests
from tests.peft_kinds import RECIPES, save
from tests.ranks import ranked_engine
from tests.tiny import LAYERS, prompt, tiny_checkpoint


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


def test_no_adapter_adds_a_sum(root: Path) -> None:
    """Two a layer, one for the embedding and one gathering of sampled logits a step, on every rank alike."""
    base = tiny_checkpoint(root, "llama")
    adapters = make_adapters(base, root / "llama")
    with ranked_engine(base, 2, adapter_dirs=(root / "llama",), max_num_seqs=8) as ranked:
        for name, path in adapters.items():
            ranked.engine.load_adapter(name, str(path))
        for requests in ([request for request in mixed_requests(2) if not request.adapters], mixed_requests(3)):
            before = [Counter(calls) for calls in ranked.meeting.calls]
            steps = _num_steps(ranked.engine)
            ranked.engine.generate(requests)
            steps = _num_steps(ranked.engine) - steps
            assert steps > 5
            for calls, earlier in zip(ranked.meeting.calls, before, strict=True):
                assert calls - earlier == Counter(all_reduce=steps * (2 * LAYERS + 1), all_gather=steps)


def _num_steps(engine: LocalEngine) -> int:
    return sum(bool(report.sequences) for report in engine.reports)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_each_rank_holds_its_part_of_the_base(root: Path, tied: bool, size: int) -> None:
    base = tiny_checkpoint(root, "llama", tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    whole = local_engine(base).core._steps.executor.runner.model
    sites = {site.name: site for site in whole.sites()}
    with ranked_engine(base, size) as ranked:
        assert len(ranked.runners) == size
        for rank, runner in enumerate(ranked.runners):
            for name, site in sites.items():
                part = site.part(rank, size)
                mine, expected = runner.model.dense_weight(name), whole.dense_weight(name)
                if site.cut.shard is Shard.REPLICATED:
                    assert torch.equal(mine, expected)
                elif site.kind is SiteKind.EMBEDDING:
                    assert torch.equal(mine, expected[part.cols])
                else:
                    assert torch.equal(mine, take(expected, part.rows)[:, part.cols])
                if site.cut.shard is not Shard.REPLICATED:
                    shared = site.cut.pieces < size  # a key/value head of several ranks
                    assert mine.numel() == expected.numel() // (site.cut.pieces if shared else size)
                assert mine.untyped_storage().nbytes() <= mine.nbytes or mine.shape != expected.shape
                bias = runner.model.dense_bias(name)
                has_bias = site.bias and (site.cut.shard is Shard.COLUMN or rank == 0)
                assert (bias is not None) is has_bias
                if bias is not None:
                    theirs = whole.dense_bias(name)
                    assert theirs is not None
                    assert torch.equal(bias, take(theirs, part.rows))


#: recipe -> site -> the shapes of A and B on a rank of two; a rank that has nothing there has None
FACTORS: Mapping[str, Mapping[str, tuple[tuple[int, int], tuple[int, int]]]] = {
    # 32 features, 4 heads of 8 for queries and 2 for keys and values, 48 wide
    "lora": {
        "self_attn.q_proj": ((4, 32), (16, 4)),
        "self_attn.k_proj": ((4, 32), (8, 4)),
        "self_attn.o_proj": ((4, 16), (32, 4)),
        "mlp.up_proj": ((4, 32), (24, 4)),
        "mlp.down_proj": ((4, 24), (32, 4)),
    },
    # blocks of the ranks' own: half of both factors
    "bdlora": {
        "self_attn.q_proj": ((2, 32), (16, 2)),
        "self_attn.o_proj": ((2, 16), (32, 2)),
        "mlp.up_proj": ((2, 32), (24, 2)),
        "mlp.down_proj": ((2, 24), (32, 2)),
    },
}


@pytest.mark.parametrize("recipe", FACTORS)
def test_each_rank_holds_its_part_of_an_adapter(root: Path, recipe: str) -> None:
    base = tiny_checkpoint(root, "llama")
    path = root / "parts" / recipe
    if not path.exists():
        save(RECIPES[recipe], base, path, seed=3)
    with ranked_engine(base, 2, adapter_dirs=(root,), lora_backend="reference") as ranked:
        ranked.engine.load_adapter(recipe, str(path))
        for runner in ranked.runners:
            tables = runner.model.tables()
            for site, shapes in FACTORS[recipe].items():
                ref = tables[f"model.layers.1.{site}"]
                assert isinstance(ref.table, ReferenceTable)
                [held] = ref.table._slots.values()
                part = held.parts[ref.part]
                assert part is not None
                assert part.factors is not None
                assert (tuple(part.factors.a.shape), tuple(part.factors.b.shape)) == shapes
                assert part.factors.a.untyped_storage().nbytes() == part.factors.a.nbytes
                assert part.factors.b.untyped_storage().nbytes() == part.factors.b.nbytes


def test_an_adapter_is_replaced_on_all_ranks_while_requests_run(root: Path) -> None:
    """Running requests end on the version they began with, on every rank; later ones get the new one."""
    base = tiny_checkpoint(root, "llama")
    adapters = make_adapters(base, root / "llama")
    long = Request(
        "long", prompt(9, seed=5), adapters=(AdapterRef("a"),), stop=StopRule(max_tokens=60, ignore_eos=True)
    )
    alone = local_engine(base, adapter_dirs=(root / "llama",))
    expected = {}
    for name in ("all", "attention"):
        alone.load_adapter("a", str(adapters[name]), on_conflict=OnConflict.REPLACE)
        [expected[name]] = [generation.token_ids for generation in alone.generate([long])]
    assert expected["all"] != expected["attention"]
    with ranked_engine(base, 2, adapter_dirs=(root / "llama",)) as ranked:
        engine = ranked.engine
        engine.load_adapter("a", str(adapters["all"]))
        first = engine.submit(long)
        for _ in range(8):
            engine.turn()
        assert 0 < len(engine.generations[first].token_ids) < 60
        engine.load_adapter("a", str(adapters["attention"]), on_conflict=OnConflict.REPLACE)
        second = engine.submit(long)
        engine.run_until_idle()
        assert engine.generations[first].token_ids == expected["all"]
        assert engine.generations[second].token_ids == expected["attention"]
        engine.unload_adapter("a")
        engine.generate([Request("base", prompt(3), stop=StopRule(max_tokens=1))])  # what is forgotten goes along
        for runner in ranked.runners:
            assert not len(runner.ops.lora.slots)


def test_an_adapter_that_one_rank_refuses_is_nowhere(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_checkpoint(root, "llama")
    adapters = make_adapters(base, root / "llama")

    def refuse(uid: str, *_: object) -> NoReturn:
        raise InvalidAdapter(f"adapter {uid}: not on my rank")

    with ranked_engine(base, 2, adapter_dirs=(root / "llama",)) as ranked:
        with monkeypatch.context() as patched:
            patched.setattr("loraplex.engine.ranks.worker.pack_sites", refuse)
            with pytest.raises(InvalidAdapter, match="not on my rank"):
                ranked.engine.load_adapter("a", str(adapters["all"]))
        assert ranked.engine.list_adapters() == ()
        ranked.engine.load_adapter("a", str(adapters["all"]))
        [got] = ranked.engine.generate(
            [Request("r", prompt(5), adapters=(AdapterRef("a"),), stop=StopRule(max_tokens=4))]
        )
        assert got.failure is None


def test_a_rank_that_fails_in_a_step_ends_the_group(root: Path) -> None:
    base = tiny_checkpoint(root, "llama")
    with ranked_engine(base, 2) as ranked:
        ranked.others[0].runner.run = lambda work: 1 / 0  # type: ignore[union-attr,method-assign,assignment,return-value]
        threading.Timer(0.3, ranked.meeting.give_up).start()  # as a closed connection would
        with pytest.raises(GroupLost, match=r"rank 1: .*ZeroDivisionError"):
            ranked.engine.generate([Request("r", prompt(5), stop=StopRule(max_tokens=4))])
        ranked.others.clear()
