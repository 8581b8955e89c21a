"""Three ranks of the demo's base, which has nine heads and three for keys and values: the tokens of one rank, and a
third of its weights each."""

from __future__ import annotations

import asyncio
from math import prod
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loraplex.config import AdaptersConfig, Config, EngineConfig, ModelConfig
from loraplex.demo.gallery import ADAPTERS_DIR, adapter_dirs
from loraplex.engine.client import EngineClient, start_engine
from loraplex.engine.messages import StepReport
from loraplex.models.loader import ModelPlan, plan_model
from loraplex.parallel.shard import Shard
from loraplex.quant.dense import packs
from loraplex.types import AdapterRef, Request, StopRule
from tests.demo_base import demo_base
from tests.engines import local_engine
from tests.held import held_bytes
from tests.lonely_rank import load_part

RANKS = 3
MAX_TOKENS = 8
TEXT = "What should I cook tonight?"
#: the base, every adapter, and a sum
MIXES = (
    (),
    *((AdapterRef(name),) for name in adapter_dirs()),
    (AdapterRef("json", 0.5), AdapterRef("pirate", 0.75)),
)
#: few rows a step, so that prompts of some run beside decodes of others
ENGINE = {"kv_cache_memory": 1 << 26, "max_num_batched_tokens": 64, "max_num_seqs": 16}


@pytest.fixture(scope="module")
def base_dir() -> Path:
    return demo_base()


def chats(base_dir: Path) -> list[Request]:
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    found = []
    for index, adapters in enumerate(MIXES):
        messages = [{"role": "user", "content": f"{TEXT} ({index})"}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        rule = StopRule(max_tokens=MAX_TOKENS, ignore_eos=True)
        found.append(Request(f"{index}", tuple(ids), adapters=adapters, stop=rule))
    return found


def tokens_of_one(base_dir: Path, asked: list[Request]) -> list[tuple[int, ...]]:
    """What one rank answers."""
    engine = local_engine(base_dir, adapter_dirs=(ADAPTERS_DIR,), **ENGINE)
    for name, path in adapter_dirs().items():
        engine.load_adapter(name, str(path))
    return [tuple(generation.token_ids) for generation in engine.generate(asked)]


@pytest.mark.timeout(240)
def test_ranks_of_the_demo_base_give_the_tokens_of_one(base_dir: Path) -> None:
    """As ``--tensor-parallel-size 3`` runs it: three processes, sums in shared memory, adapters sent in parts."""
    asked = chats(base_dir)
    expected = tokens_of_one(base_dir, asked)
    assert len(set(expected)) == len(expected), "no adapter answers as another does"
    config = Config(
        model=ModelConfig(model=str(base_dir), device="cpu", dtype="float32", threads=1, tensor_parallel_size=RANKS),
        engine=EngineConfig(**ENGINE),
        adapters=AdaptersConfig(adapter_memory=1 << 26, adapter_dirs=(str(ADAPTERS_DIR),)),
    )
    reports: list[StepReport] = []

    async def tokens(engine: EngineClient, request: Request) -> tuple[int, ...]:
        return tuple([token async for event in engine.generate(request) for token in event.token_ids])

    async def run() -> list[tuple[int, ...]]:
        engine = await start_engine(config, base_dir, "demo", lambda _: None)
        try:
            assert engine.model.tensor_parallel_size == RANKS
            engine.on_report(reports.append)
            for name, path in adapter_dirs().items():
                await engine.load_adapter(name, str(path))
            return await asyncio.gather(*(tokens(engine, request) for request in asked))
        finally:
            await engine.close()

    got = asyncio.run(asyncio.wait_for(run(), 200))
    assert got == expected
    assert max(report.adapters for report in reports) == len(adapter_dirs())
    assert any(report.prefill_tokens and report.decode_tokens for report in reports)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_rank_of_the_demo_base_holds_a_third_of_it(base_dir: Path, dtype: str) -> None:
    """Within 5 %: a third of what is cut, and all of the norms. Counted are storages, once each, not what views of
    them show; and everything that the model keeps, whether it is a weight or not."""
    plan = plan_model(base_dir, ModelConfig(device="cpu", dtype=dtype))
    cut, replicated = weight_bytes(plan)
    assert replicated < cut / 1000
    share = cut / RANKS + replicated
    whole = held_bytes(load_part(plan, 0, 1))
    assert whole == pytest.approx(cut + replicated, rel=0.05)
    for rank in range(RANKS):
        model = load_part(plan, rank, RANKS)
        held = held_bytes(model)
        assert held == pytest.approx(share, rel=0.05)
        assert held == pytest.approx(whole / RANKS, rel=0.05)
        assert model.weight_bytes == pytest.approx(held, rel=0.05)


def weight_bytes(plan: ModelPlan) -> tuple[int, int]:
    """Of what ranks share out, and of what each of them has whole. A tied head is a second, packed copy of the
    embedding where packing is worth it."""
    shards = {site.name: site.cut.shard for site in plan.spec.sites()}
    assert shards[plan.spec.names.norm] is Shard.REPLICATED
    found = {True: 0, False: 0}
    for key, shape in plan.spec.tensors().items():
        copies = 2 if key == f"{plan.spec.names.embed}.weight" and plan.spec.tied and packs(plan.placement) else 1
        is_cut = shards[key.rpartition(".")[0]] is not Shard.REPLICATED
        found[is_cut] += copies * prod(shape) * plan.placement.dtype.itemsize
    return found[True], found[False]
