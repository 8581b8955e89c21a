"""Both clients against a real server with a fake engine; the client package alone needs no server code."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import msgspec
import pytest

from loraplex import types
from loraplex.errors import OverCapacity
from loraplex_client import (
    AlreadyExists,
    AsyncClient,
    Client,
    DeadlineExceeded,
    InvalidArgument,
    Message,
    NotFound,
    Params,
    Probe,
    ResourceExhausted,
    ServerError,
    TokenizerInfo,
    Unavailable,
)
from loraplex_client.requests import generate_request, tokenize_request
from tests.fakes import EOS, FakeEngine
from tests.rpc.serving import Served, ids_of, serving, serving_thread

ANSWER = "the quick 🙂 fox"


@pytest.fixture
def server() -> Iterator[Served]:
    engine = FakeEngine()
    engine.answer = lambda request: [*ids_of(ANSWER), EOS]
    with serving_thread(engine) as served:
        yield served


@pytest.fixture
def client(server: Served) -> Iterator[Client]:
    with Client(server.app.address) as client:
        yield client


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def test_generate_and_stream_agree(client: Client, server: Served) -> None:
    server.engine.step_s = 0.01  # slow enough that the answer comes in several chunks
    client.load_adapter("fr", "/a/fr")
    params = Params(max_tokens=50, logprobs=1, prompt_logprobs=True, token_ids=True, request_id="r")
    whole = client.generate("hello", params, adapters={"fr": 0.5})
    parts = list(client.stream("hello", params, adapters={"fr": 0.5}))
    assert whole.text == "".join(part.text for part in parts) == ANSWER
    assert whole.token_ids == tuple(i for part in parts for i in part.token_ids) == (*ids_of(ANSWER), EOS)
    assert whole.logprobs == tuple(item for part in parts for item in part.logprobs)
    assert whole.prompt_logprobs == parts[0].prompt_logprobs
    assert whole.finish_reason == parts[-1].finish_reason == "stop"
    assert parts[0].finish_reason == ""
    assert parts[0].usage is None
    assert parts[-1].usage is not None
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens == len(whole.token_ids)
    assert [(use.name, use.uid, use.weight) for use in whole.adapters] == [("fr", "uid-fr-1", 0.5)]
    assert whole.adapters == parts[0].adapters
    assert whole.request_id == "r"


def test_prompts_params_and_adapters_reach_the_engine(client: Client, server: Served) -> None:
    for name in ("a", "b"):
        client.load_adapter(name, f"/{name}")
    client.generate([4, 5, 6], adapters="a")
    client.generate([Message("user", "hi")], adapters=["a", "b"])
    params = Params(max_tokens=3, min_tokens=1, stop=["x"], stop_token_ids=[9], ignore_eos=True, priority=2, seed=7)
    client.generate("hi", params)
    ids, chat, full = server.engine.requests
    assert ids.prompt_token_ids == (4, 5, 6)
    assert [ref.name for ref in ids.adapters] == ["a"]
    assert list(chat.prompt_token_ids) == ids_of("user: hi\nassistant:")
    assert [(ref.name, ref.weight) for ref in chat.adapters] == [("a", 1.0), ("b", 1.0)]
    assert (full.stop.max_tokens, full.stop.min_tokens, full.stop.stop) == (3, 1, ("x",))
    assert (full.stop.stop_token_ids, full.stop.ignore_eos, full.priority) == ((9,), True, 2)
    assert full.sampling.seed == 7
    assert client.tokenize("hi there") == tuple(ids_of("hi there"))
    assert client.tokenize([Message("user", "hi")]) == chat.prompt_token_ids


def test_adapters_and_model(client: Client) -> None:
    adapter = client.load_adapter("fr", "/a/fr", pinned=True)
    assert (adapter.name, adapter.state, adapter.residency, adapter.pinned) == ("fr", "ready", "device", True)
    assert adapter.loaded_at == datetime.fromtimestamp(1_700_000_000.5, UTC)
    assert adapter.last_used_at is None
    assert adapter.sites == {"q_proj": 2}
    with pytest.raises(AlreadyExists):
        client.load_adapter("fr", "/a/fr")
    assert client.load_adapter("fr", "/a/fr", replace=True).generation == 2
    assert [item.name for item in client.list_adapters()] == ["fr"]
    assert client.get_adapter("fr").uid == "uid-fr-2"
    watch = client.watch_adapters()
    assert next(watch).name == "fr"
    assert client.unload_adapter("fr", abort=True).state == "unloaded"
    assert next(watch).state == "unloaded"
    watch.close()
    model = client.model()
    assert (model.id, model.limits.max_adapters_per_request, model.backends["lora"]) == ("fake", 8, "reference")


def test_what_is_known_of_an_adapter_comes_whole(client: Client, server: Served) -> None:
    plain = client.load_adapter("plain", "/a/plain")
    assert (plain.changes, plain.probe, plain.invocation_tokens, plain.profile) == ({}, None, (), None)
    assert plain.tokenizer == TokenizerInfo(
        own=False, vocab_size=300, chat_template=False, chat_template_not_allowed=False
    )
    sampling = types.SamplingParams(0.5, 0.9, 3, 0.25, 1.5, -0.5, 0.125)
    server.engine.dress = lambda info: msgspec.structs.replace(
        info,
        coverage=types.Coverage({"q_proj": 2, "norm": 1}, {"q_proj": 8, "norm": 0}, {"norm": "own weight"}),
        probe=types.Probe(1.5, 0.25, 12),
        invocation_tokens=(7, 9),
        invocation_text=" go",
        template_unused=True,
        vocab_size=302,
        text=types.OwnText("d", True, True, max_token_id=301, eos_token_ids=(301, 2), sampling=sampling),
    )
    rich = client.load_adapter("rich", "/a/rich")
    assert rich == client.get_adapter("rich") == client.list_adapters()[1]
    assert (rich.sites, rich.ranks) == ({"q_proj": 2, "norm": 1}, {"q_proj": 8, "norm": 0})
    assert rich.changes == {"norm": "own weight"}
    assert rich.probe == Probe(1.5, 0.25, 12)
    assert (rich.invocation_tokens, rich.invocation_text) == ((7, 9), " go")
    assert rich.tokenizer == TokenizerInfo(own=True, vocab_size=302, chat_template=True, chat_template_not_allowed=True)
    assert rich.profile is not None
    assert rich.profile.stop_token_ids == (301, 2)
    own = rich.profile.sampling
    assert own is not None
    assert (own.temperature, own.top_k, own.repetition_penalty) == (0.5, 3, 1.5)
    assert (own.top_p, own.min_p) == pytest.approx((0.9, 0.25))
    assert (own.presence_penalty, own.frequency_penalty) == (-0.5, 0.125)


def test_an_answer_says_whether_its_adapter_was_invoked(client: Client, server: Served) -> None:
    server.engine.dress = lambda info: msgspec.structs.replace(info, invocation_tokens=(7, 9))
    client.load_adapter("act", "/a/act")
    for prompt, invoked in (([1, 7, 9, 3], True), ([1, 7, 8, 9], False)):
        assert [use.invoked for use in client.generate(prompt, adapters="act").adapters] == [invoked]
        assert [use.invoked for use in next(client.stream(prompt, adapters="act")).adapters] == [invoked]


def test_sampling_can_be_left_to_the_adapter() -> None:
    assert not generate_request("x", Params(temperature=1.0, seed=1, adapter_sampling=True), "a").HasField("sampling")
    assert generate_request("x", Params(), "a").HasField("sampling")
    assert [ref.name for ref in tokenize_request("x", {"a": 0.5}).adapters] == ["a"]


def test_errors_carry_code_field_retry_and_request_id(client: Client, server: Served) -> None:
    with pytest.raises(InvalidArgument, match="2 is not allowed") as invalid:
        client.generate("x", Params(top_p=2.0))
    assert invalid.value.field == "sampling.top_p"
    with pytest.raises(NotFound, match="'nope' is not loaded"):
        client.generate("x", adapters="nope")
    server.engine.fail_after = (0, OverCapacity("queue full", retry_after_s=1.5))
    with pytest.raises(ResourceExhausted, match="queue full") as full:
        list(client.stream("x", Params(request_id="r-9")))
    assert (full.value.retry_after_s, full.value.request_id) == (1.5, "r-9")


def test_timeout_and_leaving_a_stream_free_the_engine(client: Client, server: Served) -> None:
    server.engine.answer = lambda request: [5] * 1000
    server.engine.step_s = 0.02
    with pytest.raises(DeadlineExceeded):
        client.generate("x", Params(max_tokens=200), timeout=0.1)
    until(lambda: len(server.engine.aborted) == 1)
    stream = client.stream("x", Params(max_tokens=200))
    next(stream)
    stream.close()
    until(lambda: len(server.engine.aborted) == 2)


def test_one_client_serves_many_threads(client: Client) -> None:
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(client.generate("x").text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8
    assert len(set(texts)) == 1


def test_no_server_is_unavailable() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(Unavailable):
        client.model(timeout=5.0)


def test_async_client() -> None:
    async def main() -> None:
        engine = FakeEngine()
        engine.answer = lambda request: [*ids_of(ANSWER), EOS]
        async with serving(engine) as server, AsyncClient(server.app.address) as client:
            await client.load_adapter("fr", "/fr")
            params = Params(max_tokens=50)
            results = await asyncio.gather(*(client.generate("x", params, adapters="fr") for _ in range(5)))
            assert {result.text for result in results} == {ANSWER}
            parts = [part async for part in client.stream("x", params)]
            assert "".join(part.text for part in parts) == ANSWER
            assert await client.tokenize("hello") == tuple(ids_of("hello"))
            assert (await client.get_adapter("fr")).state == "ready"
            assert [item.name for item in await client.list_adapters()] == ["fr"]
            watch = client.watch_adapters()
            assert (await anext(watch)).name == "fr"
            assert (await client.unload_adapter("fr")).state == "unloaded"
            assert (await anext(watch)).state == "unloaded"
            await watch.aclose()
            assert (await client.model()).id == "fake"
            with pytest.raises(InvalidArgument) as invalid:
                await client.generate("x", Params(temperature=-1.0))
            assert invalid.value.field == "sampling.temperature"
            engine.answer = lambda request: [5] * 1000
            engine.step_s = 0.01
            stream = client.stream("x", Params(max_tokens=200))
            await anext(stream)
            await stream.aclose()
            async with asyncio.timeout(5.0):
                while not engine.aborted:
                    await asyncio.sleep(0.005)
            with pytest.raises(ServerError):
                await client.generate("x", Params(max_tokens=200), timeout=0.05)

    asyncio.run(main())


def test_the_client_needs_neither_torch_nor_the_server() -> None:
    heavy = ("torch", "transformers", "numpy", "msgspec", "tokenizers", "zmq", "rich", "grpc_status", "loraplex")
    code = f"import sys, loraplex_client; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == "[]"
