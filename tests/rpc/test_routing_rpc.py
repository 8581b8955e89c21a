"""What a router chose, as callers are told: in answers, streams, metrics, by clients and on the command line."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import msgspec
import pytest

from loraplex.cli import main
from loraplex.types import Candidate, RouterInfo, Routing
from loraplex_client import Candidate as Said
from loraplex_client import Client, Params, Router
from loraplex_client import Routing as Told
from loraplex_proto.v1 import adapters_pb2, generation_pb2
from loraplex_proto.v1.generation_pb2 import AdapterRef, GenerateRequest, TokenizeRequest
from tests.fakes import EOS, FakeEngine
from tests.rpc.serving import Served, ids_of, serving, serving_thread

CHOICE = Routing("topics", "uid-topics-1", "fr", (Candidate("fr", 0.75), Candidate("de", 0.2)))
NONE = msgspec.structs.replace(CHOICE, adapter="")
INFO = RouterInfo("centroid", ("fr", "de"), (1, 2), 0.01, 0.5, "en")


def routed(choice: Routing = CHOICE) -> FakeEngine:
    engine = FakeEngine()
    engine.answer = lambda request: [*ids_of("the fox jumps"), EOS]
    engine.route = lambda request: choice if request.adapters and request.adapters[0].name == "auto:topics" else None
    return engine


async def load(server: Served, *names: str) -> None:
    for name in names:
        await server.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name=name, source=f"/a/{name}"))


def ask(name: str = "auto:topics") -> GenerateRequest:
    return GenerateRequest(text="hello", adapters=[AdapterRef(name=name)], stop=generation_pb2.StopRule(max_tokens=50))


@pytest.mark.parametrize("choice", [CHOICE, NONE], ids=["an adapter", "the base"])
def test_answer_and_first_chunk_say_what_was_chosen(choice: Routing) -> None:
    async def run() -> None:
        async with serving(routed(choice)) as server:
            await load(server, "fr", "topics")
            whole = await server.generation.Generate(ask())
            chunks = [chunk async for chunk in server.generation.GenerateStream(ask())]
            named = await server.generation.Generate(ask("fr"))
            counted = server.metrics.registry.get_sample_value(
                "loraplex_generation_tokens_total", {"adapter": choice.adapter or "base"}
            )
        assert [chunk.HasField("routing") for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
        assert chunks[0].routing == whole.routing
        assert [ref.name for ref in whole.adapters] == [ref.name for ref in chunks[0].adapters]
        assert [ref.name for ref in whole.adapters] == ([choice.adapter] if choice.adapter else [])
        said = whole.routing
        assert (said.router, said.router_uid, said.adapter) == ("topics", "uid-topics-1", choice.adapter)
        assert [(each.name, each.probability) for each in said.candidates] == [("fr", 0.75), ("de", 0.2)]
        assert not named.HasField("routing")
        num_tokens = whole.usage.completion_tokens
        assert counted == num_tokens * (3 if choice.adapter else 2)

    asyncio.run(run())


def test_a_prompt_for_a_router_is_tokenized_as_the_bases() -> None:
    async def run() -> None:
        async with serving(routed()) as server:
            await load(server, "topics")
            request = TokenizeRequest(text="hello", adapters=[AdapterRef(name="auto:topics")])
            assert list((await server.generation.Tokenize(request)).token_ids) == ids_of("hello")
            request.adapters[0].name = "auto:nothing"
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await server.generation.Tokenize(request)
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(run())


@pytest.fixture
def server() -> Iterator[Served]:
    engine = routed()
    engine.dress = lambda info: (
        msgspec.structs.replace(info, kind="router", router=INFO) if info.name == "topics" else info
    )
    with serving_thread(engine) as served:
        yield served


def test_clients_and_commands_say_so(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    address = server.app.address
    with Client(address) as client:
        client.load_adapter("fr", "/a/fr")
        assert client.load_adapter("topics", "/a/topics").router == Router(
            "centroid", ("fr", "de"), (1, 2), 0.01, 0.5, "en"
        )
        said = Told("topics", "uid-topics-1", "fr", (Said("fr", 0.75), Said("de", 0.2)))
        assert client.generate("hello", Params(max_tokens=50), adapters="auto:topics").routing == said
        assert client.generate("hello", Params(max_tokens=50), adapters="fr").routing is None
        chunks = list(client.stream("hello", Params(max_tokens=50), adapters="auto:topics"))
        assert [chunk.routing for chunk in chunks] == [said] + [None] * (len(chunks) - 1)
    assert main(["generate", "hello", "--server", address, "--adapter", "auto:topics"]) == 0
    out = capsys.readouterr()
    assert out.out == "the fox jumps\n"
    assert out.err == "note: router 'topics' chose fr (fr 75%, de 20%)\n"
    assert main(["adapters", "show", "topics", "--server", address]) == 0
    assert (
        "among fr, de by centroid; auto:topics asks for it; below a probability of 0.5: en" in capsys.readouterr().out
    )
