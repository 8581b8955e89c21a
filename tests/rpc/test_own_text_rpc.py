"""Requests of adapters with text of their own through real gRPC: bounds, stops, defaults, retries, hostile files."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import grpc
import pytest

from loraplex.errors import Unavailable
from loraplex.text.pack import TextPack, pack_file
from loraplex.types import AdapterInfo, AdapterState, OwnText, Request, SamplingParams
from loraplex_proto.v1 import generation_pb2
from loraplex_proto.v1.generation_pb2 import AdapterRef, GenerateRequest
from tests.fakes import FakeEngine
from tests.rpc.serving import Served, backend, ids_of, serving

#: the id of the first token that is added
NEW = backend().get_vocab_size()
OUTPUT = generation_pb2.OutputOptions(token_ids=True, include_stop=True)


def tokenizer_with(token: str, **parts: object) -> bytes:
    """The base's tokenizer with one token more."""
    document = json.loads(backend().to_str())
    added = {**document["added_tokens"][0], "id": NEW, "content": token, "special": False}
    return json.dumps({**document, "added_tokens": [*document["added_tokens"], added], **parts}).encode()


def ready(name: str, digest: str = "", *, generation: int = 1, vocab_size: int = 0, **own: object) -> AdapterInfo:
    return AdapterInfo(
        name,
        f"uid-{name}-{generation}",
        state=AdapterState.READY,
        generation=generation,
        text=OwnText(digest, **own) if digest else None,  # type: ignore[arg-type]
        vocab_size=vocab_size,
    )


def engine_with(spool: Path, **tokens: str) -> FakeEngine:
    """An engine with one adapter for each digest of ``tokens``, whose tokenizer has that token more."""
    engine = FakeEngine()
    engine.text_spool = spool
    for digest, token in tokens.items():
        pack_file(spool, digest).write_bytes(TextPack(tokenizer_with(token)).encode())
        engine.put(ready(digest, digest, vocab_size=301, tokenizer=True, max_token_id=NEW))
    return engine


def ask(*adapters: str, **fields: object) -> GenerateRequest:
    refs = [AdapterRef(name=name) for name in adapters]
    stop = generation_pb2.StopRule(max_tokens=4)
    return GenerateRequest(**{"text": "a <t> b", "stop": stop, "output": OUTPUT, "adapters": refs, **fields})  # type: ignore[arg-type]


async def answer(server: Served, request: GenerateRequest) -> generation_pb2.GenerateResponse:
    return await server.generation.Generate(request)


async def code(server: Served, request: GenerateRequest) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.generation.Generate(request)
    return caught.value.code(), caught.value.details() or ""


def test_prompt_and_answer_are_of_the_adapter_s_tokenizer(tmp_path: Path) -> None:
    async def main() -> None:
        engine = engine_with(tmp_path, d="<t>", e="<u>")
        engine.answer = lambda request: [NEW, 1, 0]
        async with serving(engine) as server:
            mine = await server.generation.Generate(ask("d"))
            other = await server.generation.Generate(ask("e"))
            tokenized = await server.generation.Tokenize(
                generation_pb2.TokenizeRequest(text="a <t> b", adapters=[AdapterRef(name="d")])
            )
        assert list(tokenized.token_ids) == list(engine.requests[0].prompt_token_ids)
        assert NEW in engine.requests[0].prompt_token_ids
        assert engine.requests[1].prompt_token_ids == tuple(ids_of("a <t> b"))
        assert [request.text_digest for request in engine.requests] == ["d", "e"]
        assert (mine.text[:3], other.text[:3]) == ("<t>", "<u>")

    asyncio.run(main())


def test_token_ids_are_bounded_by_what_the_adapter_knows(tmp_path: Path) -> None:
    async def main() -> None:
        engine = engine_with(tmp_path, d="<t>")
        ids = generation_pb2.TokenIds(ids=[1, 300])
        stop = generation_pb2.StopRule(max_tokens=2, stop_token_ids=[300])
        async with serving(engine) as server:
            await server.generation.Generate(ask("d", text=None, token_ids=ids, stop=stop))
            for request in (ask(text=None, token_ids=ids), ask(stop=stop)):
                status, words = await code(server, request)
                assert status is grpc.StatusCode.INVALID_ARGUMENT
                assert "token id 300 is outside the vocabulary; allowed are 0 to 299" in words
            far = generation_pb2.TokenIds(ids=[301])
            assert "0 to 300" in (await code(server, ask("d", text=None, token_ids=far)))[1]

    asyncio.run(main())


def test_stop_tokens_and_sampling_defaults(tmp_path: Path) -> None:
    defaults = SamplingParams(temperature=0.5, top_k=3)

    async def main() -> None:
        engine = engine_with(tmp_path, d="<t>")
        engine.put(ready("d", "d", generation=2, vocab_size=301, eos_token_ids=(NEW,), sampling=defaults))
        engine.put(ready("plain"))
        engine.answer = lambda request: [*ids_of("x"), NEW, *ids_of("y")]
        async with serving(engine) as server:
            shown = await server.generation.Generate(ask("d"))
            cut = await server.generation.Generate(ask("d", output=generation_pb2.OutputOptions()))
            await server.generation.Generate(ask("d", sampling=generation_pb2.SamplingParams()))
            await server.generation.Generate(ask("d", "plain"))
        assert (shown.text, shown.finish_reason) == ("x<t>", generation_pb2.STOP)
        assert cut.text == "x"
        assert [request.sampling for request in engine.requests] == [defaults, defaults, *[SamplingParams()] * 2]

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_made_for_a_replaced_version_is_made_anew(tmp_path: Path, stream: bool) -> None:
    async def main() -> None:
        engine = engine_with(tmp_path, d="<t>", e="<u>")
        engine.put(ready("a", "d", vocab_size=301))

        def replace(request: Request) -> None:
            if request.text_digest == "d":
                engine.put(ready("a", "e", generation=2, vocab_size=301))

        engine.on_submit = replace
        engine.answer = lambda request: [NEW] * 4
        async with serving(engine) as server:
            request = ask("a", text="a <u> b")
            if stream:
                text = "".join([chunk.text async for chunk in server.generation.GenerateStream(request)])
            else:
                text = (await server.generation.Generate(request)).text
        assert text == "<u>" * 4
        assert [request.text_digest for request in engine.requests] == ["d", "e"]
        assert [NEW in request.prompt_token_ids for request in engine.requests] == [False, True]

    asyncio.run(main())


def test_versions_that_never_stay_end_unavailable(tmp_path: Path) -> None:
    async def main() -> None:
        engine = engine_with(tmp_path, d="<t>", e="<u>")
        engine.put(ready("a", "d"))
        engine.on_submit = lambda request: engine.put(ready("a", "e" if request.text_digest == "d" else "d"))
        async with serving(engine) as server:
            assert (await code(server, ask("a")))[0] is grpc.StatusCode.UNAVAILABLE
        assert len(engine.requests) == 9

    asyncio.run(main())


def test_what_is_unavailable_for_another_reason_is_not_tried_again(tmp_path: Path) -> None:
    async def main() -> None:
        engine = engine_with(tmp_path, d="<t>")
        engine.fail_after = (0, Unavailable("draining"))
        async with serving(engine) as server:
            assert (await code(server, ask("d"))) == (grpc.StatusCode.UNAVAILABLE, "draining")
        assert len(engine.requests) == 1

    asyncio.run(main())


def test_a_slow_tokenizer_holds_up_nobody_else(tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(z+)+b"}, "behavior": "Isolated", "invert": False}
    usual = json.loads(backend().to_str())["pre_tokenizer"]
    slow = tokenizer_with("<t>", pre_tokenizer={"type": "Sequence", "pretokenizers": [split, usual]})
    words = ("z" * 20 + " ") * 150  # two seconds or three, which go on behind this test: nobody can stop them

    async def main() -> None:
        engine = engine_with(tmp_path, d="<t>")
        pack_file(tmp_path, "slow").write_bytes(TextPack(slow).encode())
        engine.put(ready("slow", "slow"))
        async with serving(engine) as server:
            calls = [asyncio.ensure_future(answer(server, ask("slow", text=words))) for _ in range(6)]
            await asyncio.sleep(0.3)
            start = time.monotonic()
            await server.generation.Generate(ask(text="the fox"))
            await server.generation.Generate(ask("d"))
            took = time.monotonic() - start
            assert not any(call.done() for call in calls), "it was not slow"
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        assert took < 1.5

    asyncio.run(main())


def test_an_adapter_that_loads_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    async def main() -> None:
        engine = engine_with(tmp_path, d="<t>")
        async with serving(engine) as server:
            engine.put(AdapterInfo("late", state=AdapterState.LOADING))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await server.generation.Generate(ask("late"), timeout=0.2)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            waiting = asyncio.ensure_future(answer(server, ask("late")))
            await asyncio.sleep(0.1)
            assert engine.requests == []
            engine.put(ready("late", "d", vocab_size=301))
            await waiting
            assert engine.requests[0].text_digest == "d"

    asyncio.run(main())
