"""The engine as a process behind its client: start, serve, die, and what callers then see."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

import loraplex
from loraplex.config import AdaptersConfig, Config, EngineConfig, ModelConfig, engine_environment
from loraplex.engine.client import EngineClient, start_engine
from loraplex.engine.messages import Outputs, StepReport, Submit, TokenEvent
from loraplex.errors import AlreadyExists, InvalidConfig, InvalidModel, NotFound, Unavailable
from loraplex.types import AdapterRef, AdapterState, FinishReason, Request, StopRule
from tests.engines import local_engine, make_adapters
from tests.oracle import Oracle
from tests.tiny import prompt, tiny_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("process")


def request(name: str | None = None, *, seed: int = 0, max_tokens: int = 8) -> Request:
    return Request(
        f"r{seed}",
        prompt(10, seed=seed),
        adapters=() if name is None else (AdapterRef(name),),
        stop=StopRule(max_tokens=max_tokens, ignore_eos=True),
    )


async def tokens(engine: EngineClient, asked: Request) -> list[int]:
    return [token async for event in engine.generate(asked) for token in event.token_ids]


async def start(root: Path) -> EngineClient:
    """An engine process on a tiny llama."""
    base = tiny_checkpoint(root, "llama")
    config = Config(
        model=ModelConfig(model=str(base), device="cpu", dtype="float32", threads=1),
        engine=EngineConfig(kv_cache_memory=1 << 22),
        adapters=AdaptersConfig(adapter_memory=1 << 24, adapter_dirs=(str(root),)),
    )
    return await start_engine(config, base, "tiny", lambda _: None)


def serve(root: Path, use: Callable[[EngineClient], Awaitable[None]]) -> None:
    """Start an engine process, use it, end it."""

    async def run() -> None:
        client = await start(root)
        try:
            await use(client)
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(run(), 120))


Use = Callable[[Callable[[EngineClient], Awaitable[None]]], None]


@pytest.fixture(scope="module")
def shared(root: Path) -> Iterator[Use]:
    """Uses one engine process after another test did. A test leaves no adapter there."""
    with asyncio.Runner() as runner:
        client = runner.run(start(root))
        yield lambda use: runner.run(asyncio.wait_for(use(client), 120))
        runner.run(client.close())


def test_loads_serves_replaces_and_unloads(root: Path, shared: Use) -> None:
    base = tiny_checkpoint(root, "llama")
    adapters = make_adapters(base, root / "adapters", ("all", "one"))
    oracle = Oracle(base, adapters)

    async def use(engine: EngineClient) -> None:
        loaded = await engine.load_adapter("a", str(adapters["all"]))
        assert (loaded.state, loaded.max_rank, loaded.generation) == (AdapterState.READY, 4, 1)
        assert loaded.coverage.sites["q_proj"] == 2
        got = await asyncio.gather(*(tokens(engine, request(n, seed=s)) for s, n in enumerate(["a", None, "a", None])))
        names = ["all", None, "all", None]
        assert got == [oracle.greedy(n, request(seed=s).prompt_token_ids, 8) for s, n in enumerate(names)]
        with pytest.raises(AlreadyExists, match="'a' is loaded"):
            await engine.load_adapter("a", str(adapters["one"]))
        with pytest.raises(NotFound, match="'b' is not loaded"):
            await tokens(engine, request("b"))
        assert [a.name for a in await engine.list_adapters()] == ["a"]
        assert (await engine.unload_adapter("a")).state is AdapterState.UNLOADED
        assert await engine.list_adapters() == []
        with pytest.raises(NotFound):
            await engine.get_adapter("a")

    shared(use)


def test_closing_a_stream_frees_it_within_a_step(shared: Use) -> None:
    async def use(engine: EngineClient) -> None:
        reports: list[StepReport] = []
        engine.on_report(reports.append)
        stream = engine.generate(request(max_tokens=200))
        async for event in stream:
            if event.token_ids:
                break
        await stream.aclose()
        while not reports or reports[-1].running:
            await asyncio.sleep(0.01)
        # the heartbeat of an idle engine shows that nothing is held
        count = len(reports)
        while len(reports) == count:
            await asyncio.sleep(0.05)
        assert (reports[-1].running, reports[-1].waiting, reports[-1].kv_pages_used) == (0, 0, 0)

    shared(use)


def test_killed_engine_ends_everything_unavailable(root: Path) -> None:
    async def use(engine: EngineClient) -> None:
        deaths: list[str] = []
        engine.on_death(deaths.append)
        stream = engine.generate(request(max_tokens=240))
        first = await anext(stream)
        assert isinstance(first, TokenEvent)
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(Unavailable, match="exit code -9"):
            async for _ in stream:
                pass
        assert not engine.alive
        assert len(deaths) == 1
        with pytest.raises(Unavailable):
            await tokens(engine, request())
        with pytest.raises(Unavailable):
            await engine.list_adapters()

    serve(root, use)


def test_a_bad_model_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")

    async def run() -> None:
        with pytest.raises(InvalidModel, match=r"config\.json"):
            await start_engine(Config(model=ModelConfig(device="cpu")), tmp_path, "bad", lambda _: None)

    asyncio.run(run())


def test_engine_ends_when_its_front_end_dies(root: Path) -> None:
    """The lifeline closes: nobody is left to talk to."""

    async def use(engine: EngineClient) -> None:
        stdin = engine._process.stdin
        assert stdin is not None
        stdin.close()
        assert await asyncio.wait_for(engine._process.wait(), 10) == 0

    serve(root, use)


def test_watch_shows_the_present_and_then_changes(root: Path, shared: Use) -> None:
    adapters = make_adapters(tiny_checkpoint(root, "llama"), root / "adapters", ("all", "one"))

    async def use(engine: EngineClient) -> None:
        await engine.load_adapter("a", str(adapters["all"]))
        seen: list[tuple[str, AdapterState]] = []

        async def watch() -> None:
            async for info in engine.watch_adapters():
                seen.append((info.name, info.state))

        watcher = asyncio.create_task(watch())
        await asyncio.sleep(0.1)
        await engine.load_adapter("b", str(adapters["one"]))
        await engine.unload_adapter("a")
        await asyncio.sleep(0.1)
        watcher.cancel()
        assert seen == [
            ("a", AdapterState.READY),
            ("b", AdapterState.LOADING),
            ("b", AdapterState.READY),
            ("a", AdapterState.UNLOADED),
        ]
        await engine.unload_adapter("b")

    shared(use)


def test_finish_reason_and_usage(shared: Use) -> None:
    async def use(engine: EngineClient) -> None:
        events = [event async for event in engine.generate(request(max_tokens=3))]
        assert events[-1].finish is FinishReason.LENGTH
        usage = events[-1].usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (10, 3)
        assert 0 <= usage.queue_s <= usage.ttft_s <= usage.total_s

    shared(use)


def test_usage_comes_with_the_first_token(root: Path) -> None:
    """A front end that ends a request at a stop string hears no more of it."""
    core = local_engine(tiny_checkpoint(root, "llama")).core
    core.handle(b"me", Submit(1, request(max_tokens=3)))
    events: list[TokenEvent] = []
    while not events or not events[-1].terminal:
        core.turn()
        to_each, _ = core.take_outputs()
        events += [e for message in to_each.get(b"me", ()) if isinstance(message, Outputs) for e in message.events]
    first, *between, last = [event for event in events if event.token_ids]
    assert first.usage is not None
    assert last.usage is not None
    assert (first.usage.prompt_tokens, first.usage.completion_tokens, last.usage.completion_tokens) == (10, 1, 3)
    assert first.usage.queue_s == last.usage.queue_s > 0
    assert [event.usage for event in between] == [None]


def test_the_engine_process_is_bounded_and_imports_what_we_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    environment = engine_environment(threads=3)
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert 0 < int(environment["GOMP_SPINCOUNT"]) < 100_000
    assert environment["LRU_CACHE_CAPACITY"] == "128"
    assert environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7", "what the operator set stands"
    assert str(Path(loraplex.__file__).parent.parent) in environment["PYTHONPATH"].split(os.pathsep)


def test_a_path_too_long_for_sockets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("d" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(InvalidConfig, match="set TMPDIR to a shorter directory"):
        asyncio.run(start_engine(Config(), tmp_path, "tiny", lambda _: None))
    assert not list(long.iterdir())
