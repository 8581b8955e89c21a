"""The promise through the whole stack: a real server process, gRPC, the real demo base, its adapters and two more,
24 requests in flight together, each with the tokens that PEFT + transformers give it alone (float32)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.demo.gallery import adapter_dirs
from loraplex.demo.server_process import ServerProcess, running_server
from loraplex_client import AsyncClient, Message, Params
from tests.demo_base import demo_base
from tests.oracle import ALL_LINEAR, Oracle, make_adapter

MAX_TOKENS = 12
PROMPTS = (
    "List three fruits and their colors.",
    "Tell me about the moon.",
    "What should I cook tonight?",
    "How do I get to the station?",
)


@pytest.fixture(scope="module")
def base_dir() -> Path:
    return demo_base()


@pytest.fixture(scope="module")
def adapters(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("adapters")
    random_ones = {
        "wide": {"r": 24, "lora_alpha": 24, "target_modules": ALL_LINEAR},
        "ends": {"r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens", "lm_head"]},
    }
    paths = dict(adapter_dirs())
    for seed, (name, config) in enumerate(random_ones.items()):
        paths[name] = make_adapter(base_dir, made / name, seed=seed, strength=0.02, **config)
    assert len(paths) >= 5
    return paths


@pytest.fixture(scope="module")
def server(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    arguments = ["--model", "demo", "--dtype", "float32", "--max-num-batched-tokens", "64", "--max-num-seqs", "16"]
    arguments += ["--kv-cache-memory", "64MiB"]  # few pages: some sequences are preempted
    for name, path in adapters.items():
        arguments += ["--adapter", f"{name}={path}"]
    with running_server(arguments, log=tmp_path_factory.mktemp("server") / "log") as process:
        yield process


@pytest.mark.timeout(280)
def test_24_requests_over_grpc_are_each_as_alone(
    base_dir: Path, adapters: dict[str, Path], server: ServerProcess
) -> None:
    rng = random.Random(5)
    names = [None, *adapters]
    asked = [(names[i % len(names)], f"{rng.choice(PROMPTS)} ({i % 9})") for i in range(24)]

    async def run() -> list[tuple[list[int], list[int]]]:
        async with AsyncClient(server.address) as client:

            async def one(name: str | None, text: str) -> tuple[list[int], list[int]]:
                await asyncio.sleep(rng.random() * 2)
                prompt = await client.tokenize([Message("user", text)])
                params = Params(max_tokens=MAX_TOKENS, ignore_eos=True, token_ids=True)
                result = await client.generate(prompt, params, adapters=name or "")
                return list(prompt), list(result.token_ids)

            return await asyncio.gather(*(one(name, text) for name, text in asked))

    got = asyncio.run(run())
    oracle = Oracle(base_dir, adapters)
    assert all(len(tokens) == MAX_TOKENS for _, tokens in got)
    expected = [oracle.picks(name, prompt, tokens) for (name, _), (prompt, tokens) in zip(asked, got, strict=True)]
    assert [tokens for _, tokens in got] == expected
