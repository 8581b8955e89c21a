"""Generation through real gRPC: text, streams, stops, logprobs, and what a request resolves to."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from loraplex.types import Request
from loraplex_proto.v1 import adapters_pb2, generation_pb2
from loraplex_proto.v1.generation_pb2 import GenerateChunk, GenerateRequest, GenerateResponse
from tests.fakes import EOS, FakeEngine
from tests.rpc.serving import Served, ids_of, serving, without_tokenizer

ANSWER = "the quick 🙂 brown fox 你好 jumps"


def saying(text: str, *, end: Sequence[int] = (EOS,)) -> FakeEngine:
    engine = FakeEngine()
    engine.answer = lambda request: [*ids_of(text), *end]
    return engine


def ask(**fields: object) -> GenerateRequest:
    stop = generation_pb2.StopRule(max_tokens=100)
    return GenerateRequest(**{"text": "hello", "stop": stop, **fields})  # type: ignore[arg-type]


async def chunks(server: Served, request: GenerateRequest) -> list[GenerateChunk]:
    return [chunk async for chunk in server.generation.GenerateStream(request)]


def joined(parts: list[GenerateChunk]) -> GenerateResponse:
    whole = GenerateResponse(request_id=parts[0].request_id, text="".join(part.text for part in parts))
    for part in parts:
        whole.token_ids.extend(part.token_ids)
        whole.logprobs.extend(part.logprobs)
        whole.prompt_logprobs.extend(part.prompt_logprobs)
        whole.adapters.extend(part.adapters)
        whole.finish_reason = part.finish_reason
    return whole


@pytest.mark.parametrize("tokens_per_event", [1, 3, 1000])
def test_unary_equals_stream_and_characters_stay_whole(tokens_per_event: int) -> None:
    async def main() -> None:
        engine = saying(ANSWER)
        engine.tokens_per_event = tokens_per_event
        output = generation_pb2.OutputOptions(token_ids=True, logprobs=2, prompt_logprobs=True)
        async with serving(engine) as server:
            request = ask(request_id="r-1", output=output)
            whole = await server.generation.Generate(request)
            parts = await chunks(server, request)
        assert whole.text == ANSWER
        assert list(whole.token_ids) == [*ids_of(ANSWER), EOS]
        assert whole.finish_reason == generation_pb2.STOP
        assert whole.request_id == "r-1"
        assert not any("\ufffd" in part.text for part in parts)
        assert [part.HasField("usage") for part in parts] == [False] * (len(parts) - 1) + [True]
        expected = GenerateResponse()
        expected.CopyFrom(whole)
        expected.ClearField("usage")
        assert joined(parts) == expected
        usage = whole.usage
        assert (usage.prompt_tokens, usage.cached_prompt_tokens) == (len(ids_of("hello")), 2)
        assert usage.completion_tokens == len(ids_of(ANSWER)) + 1
        assert 0 < usage.ttft_s <= usage.total_s

    asyncio.run(main())


def test_logprobs_carry_token_texts() -> None:
    async def main() -> GenerateResponse:
        async with serving(saying("fox")) as server:
            return await server.generation.Generate(
                ask(output=generation_pb2.OutputOptions(logprobs=2, prompt_logprobs=True))
            )

    response = asyncio.run(main())
    assert "".join(item.text for item in response.logprobs) == "fox<eos>"
    assert [len(item.top) for item in response.logprobs] == [2] * len(response.logprobs)
    assert response.logprobs[0].logprob == response.logprobs[0].top[0].logprob == -0.5
    assert "".join(item.text for item in response.prompt_logprobs) == "hello"
    assert not response.token_ids


@pytest.mark.parametrize(
    ("stop", "include", "text"),
    [
        (["k 🙂 b"], False, "the quic"),
        (["k 🙂 b"], True, "the quick 🙂 b"),
        (["never", "好"], False, "the quick 🙂 brown fox 你"),
        (["never"], False, ANSWER),
    ],
)
def test_stop_strings_across_token_borders(stop: list[str], include: bool, text: str) -> None:
    async def main() -> None:
        engine = saying(ANSWER, end=ids_of(" and on and on"))
        rule = generation_pb2.StopRule(max_tokens=100, stop=stop)
        output = generation_pb2.OutputOptions(include_stop=include, token_ids=True)
        async with serving(engine) as server:
            whole = await server.generation.Generate(ask(stop=rule, output=output))
            parts = await chunks(server, ask(stop=rule, output=output))
        hit = stop != ["never"]
        assert whole.text == (text if hit else ANSWER + " and on and on")
        assert whole.finish_reason == (generation_pb2.STOP if hit else generation_pb2.LENGTH)
        assert whole.usage.completion_tokens == len(whole.token_ids)
        assert "".join(part.text for part in parts) == whole.text
        assert [i for part in parts for i in part.token_ids] == list(whole.token_ids)
        assert bool(engine.aborted) == hit  # a stream may be read to its end before the stop string is seen
        assert not engine.running

    asyncio.run(main())


@pytest.mark.parametrize(("include", "text"), [(False, "the"), (True, "the<eos>")])
def test_stop_token_text_is_shown_only_when_asked(include: bool, text: str) -> None:
    async def main() -> str:
        async with serving(saying("the")) as server:
            output = generation_pb2.OutputOptions(include_stop=include)
            return (await server.generation.Generate(ask(output=output))).text

    assert asyncio.run(main()) == text


def test_stop_token_id_ends_without_its_text() -> None:
    async def main() -> GenerateResponse:
        ids = ids_of("abc")
        async with serving(saying("abc")) as server:
            return await server.generation.Generate(
                ask(stop=generation_pb2.StopRule(max_tokens=9, stop_token_ids=[ids[-1]]))
            )

    response = asyncio.run(main())
    assert response.text == "ab"
    assert response.finish_reason == generation_pb2.STOP


def test_chat_and_token_ids_reach_the_engine_as_tokens() -> None:
    async def main() -> list[Request]:
        engine = FakeEngine()
        async with serving(engine) as server:
            chat = generation_pb2.Chat(messages=[generation_pb2.Message(role="user", content="the fox")])
            await server.generation.Generate(GenerateRequest(chat=chat))
            await server.generation.Generate(GenerateRequest(token_ids=generation_pb2.TokenIds(ids=[5, 6, 7])))
            tokens = await server.generation.Tokenize(generation_pb2.TokenizeRequest(chat=chat))
        assert list(tokens.token_ids) == ids_of("user: the fox\nassistant:")
        return engine.requests

    chat, ids = asyncio.run(main())
    assert list(chat.prompt_token_ids) == ids_of("user: the fox\nassistant:")
    assert ids.prompt_token_ids == (5, 6, 7)


def test_defaults_and_every_sampling_field() -> None:
    async def main() -> list[Request]:
        engine = FakeEngine()
        sampling = generation_pb2.SamplingParams(
            temperature=0.5,
            top_p=0.25,
            top_k=1000,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-1,
            frequency_penalty=2,
            seed=2**64 - 1,
        )
        async with serving(engine) as server:
            await server.generation.Generate(GenerateRequest(text="x"))
            await server.generation.Generate(GenerateRequest(text="x", sampling=sampling, priority=-3))
        return engine.requests

    plain, full = asyncio.run(main())
    neutral = plain.sampling
    assert (neutral.temperature, neutral.top_p, neutral.repetition_penalty, neutral.seed) == (0.0, 1.0, 1.0, None)
    assert plain.stop.max_tokens == 8
    assert len(plain.request_id) == 32
    sampling = full.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 300, 0.125)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -1.0, 2.0)
    assert (sampling.seed, full.priority) == (2**64 - 1, -3)


def test_max_tokens_is_cut_to_the_room_the_model_has() -> None:
    async def main() -> list[Request]:
        engine = FakeEngine()
        async with serving(engine) as server:
            ids = generation_pb2.TokenIds(ids=[1] * 250)
            await server.generation.Generate(
                GenerateRequest(token_ids=ids, stop=generation_pb2.StopRule(max_tokens=1_000_000))
            )
        return engine.requests

    assert asyncio.run(main())[0].stop.max_tokens == 6


def test_adapters_come_back_resolved_on_the_first_chunk() -> None:
    async def main() -> list[GenerateChunk]:
        async with serving() as server:
            for name in ("fr", "sql"):
                await server.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name=name, source=f"/a/{name}"))
            refs = [generation_pb2.AdapterRef(name="fr"), generation_pb2.AdapterRef(name="sql", weight=0.25)]
            whole = await server.generation.Generate(ask(adapters=refs))
            assert [(ref.name, ref.uid, ref.weight) for ref in whole.adapters] == [
                ("fr", "uid-fr-1", 1.0),
                ("sql", "uid-sql-1", 0.25),
            ]
            return await chunks(server, ask(adapters=refs))

    first, *rest = asyncio.run(main())
    assert [ref.uid for ref in first.adapters] == ["uid-fr-1", "uid-sql-1"]
    assert not any(part.adapters for part in rest)


def test_model_without_tokenizer_serves_token_ids() -> None:
    async def main() -> GenerateResponse:
        async with serving(tokenizer=without_tokenizer()) as server:
            return await server.generation.Generate(
                GenerateRequest(
                    token_ids=generation_pb2.TokenIds(ids=[4, 5]), output=generation_pb2.OutputOptions(token_ids=True)
                )
            )

    response = asyncio.run(main())
    assert response.text == ""
    assert list(response.token_ids) == [10, 11, 12, 13, 14, 15, 16, 17]
