"""Every wrong field gives its code, a message that names field, value and what is allowed, and a server that serves."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from loraplex.errors import (
    LoraplexError,
    Mismatch,
    NonFinite,
    NotPermitted,
    OverCapacity,
    Unavailable,
    UnsupportedFeature,
)
from loraplex_proto.v1 import adapters_pb2
from loraplex_proto.v1.generation_pb2 import (
    AdapterRef,
    Chat,
    GenerateRequest,
    Message,
    OutputOptions,
    SamplingParams,
    StopRule,
    TokenIds,
    TokenizeRequest,
)
from tests.fakes import FakeEngine
from tests.rpc.serving import Served, serving

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def text(**fields: object) -> GenerateRequest:
    return GenerateRequest(text="hi", **fields)  # type: ignore[arg-type]


def sampling(**fields: float) -> GenerateRequest:
    return text(sampling=SamplingParams(**fields))  # type: ignore[arg-type]


BAD: list[tuple[GenerateRequest, str, tuple[str, ...]]] = [
    (GenerateRequest(), "prompt", ("not set", "text, token_ids, chat")),
    (GenerateRequest(text=""), "text", ("is empty",)),
    (GenerateRequest(token_ids=TokenIds()), "token_ids.ids", ("is empty",)),
    (GenerateRequest(token_ids=TokenIds(ids=[1, 300])), "token_ids.ids", ("token id 300", "0 to 299")),
    (GenerateRequest(token_ids=TokenIds(ids=[1] * 256)), "token_ids.ids", ("256 tokens", "at most 255")),
    (GenerateRequest(text="x " * 400), "prompt", ("tokens; at most 255",)),
    (GenerateRequest(chat=Chat()), "chat.messages", ("is empty",)),
    (GenerateRequest(chat=Chat(messages=[Message(content="x")])), "chat.messages.role", ("'' is not a role",)),
    (GenerateRequest(chat=Chat(messages=[Message(role="u")] * 1025)), "chat.messages", ("1025", "at most 1024")),
    (text(request_id="no spaces"), "request_id", ("'no spaces' is not a name", "1 to 128")),
    (text(request_id="a" * 129), "request_id", ("is not a name",)),
    (text(request_id="a\n"), "request_id", (r"'a\n' is not a name",)),
    (sampling(temperature=-1), "sampling.temperature", ("-1 is not allowed", "0 to 100")),
    (sampling(temperature=math.nan), "sampling.temperature", ("nan is not allowed",)),
    (sampling(temperature=math.inf), "sampling.temperature", ("inf is not allowed",)),
    (sampling(temperature=1e-5), "sampling.temperature", ("1e-05 is too small", "at least 0.001")),
    (sampling(top_p=1.5), "sampling.top_p", ("1.5 is not allowed", "0 to 1")),
    (sampling(top_p=math.nan), "sampling.top_p", ("nan",)),
    (sampling(min_p=-0.5), "sampling.min_p", ("-0.5 is not allowed",)),
    (sampling(repetition_penalty=-1), "sampling.repetition_penalty", ("-1 is not allowed",)),
    (sampling(repetition_penalty=math.inf), "sampling.repetition_penalty", ("inf",)),
    (sampling(presence_penalty=-3), "sampling.presence_penalty", ("-3 is not allowed", "-2 to 2")),
    (sampling(frequency_penalty=math.nan), "sampling.frequency_penalty", ("nan",)),
    (text(stop=StopRule(max_tokens=5, min_tokens=6)), "stop.min_tokens", ("6 is more than max_tokens", "5")),
    (
        GenerateRequest(token_ids=TokenIds(ids=[1] * 250), stop=StopRule(max_tokens=99, min_tokens=50)),
        "stop.min_tokens",
        ("50 is too large; at most 6",),
    ),
    (text(stop=StopRule(stop=["x"] * 17)), "stop.stop", ("17 entries; at most 16",)),
    (text(stop=StopRule(stop=[""])), "stop.stop", ("0 bytes", "1 to 256")),
    (text(stop=StopRule(stop=["é" * 129])), "stop.stop", ("258 bytes", "1 to 256")),
    (text(stop=StopRule(stop_token_ids=[1] * 65)), "stop.stop_token_ids", ("65 entries; at most 64",)),
    (text(stop=StopRule(stop_token_ids=[300])), "stop.stop_token_ids", ("token id 300",)),
    (text(output=OutputOptions(logprobs=21)), "output.logprobs", ("21 is too large; at most 20",)),
    (text(adapters=[AdapterRef(name=f"a{i}") for i in range(9)]), "adapters", ("9 entries; at most 8",)),
    (text(adapters=[AdapterRef(name="a"), AdapterRef(name="a")]), "adapters.name", ("'a' stands there twice",)),
    (text(adapters=[AdapterRef(name="../etc")]), "adapters.name", ("'../etc' is not a name",)),
    (text(adapters=[AdapterRef()]), "adapters.name", ("'' is not a name",)),
    (text(adapters=[AdapterRef(name="a", weight=math.nan)]), "adapters.weight", ("nan is not allowed",)),
    (text(adapters=[AdapterRef(name="a", weight=-math.inf)]), "adapters.weight", ("-inf is not allowed",)),
    (text(adapters=[AdapterRef(name="a", weight=101)]), "adapters.weight", ("101 is not allowed", "-100 to 100")),
]


def details_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    raw = dict(error.trailing_metadata())["grpc-status-details-bin"]  # type: ignore[call-overload]
    assert isinstance(raw, bytes)
    return status_pb2.Status.FromString(raw)


def field_of(error: grpc.aio.AioRpcError) -> str:
    bad = error_details_pb2.BadRequest()
    for detail in details_of(error).details:
        detail.Unpack(bad)
    return bad.field_violations[0].field if bad.field_violations else ""


async def refused(server: Served, request: GenerateRequest) -> grpc.aio.AioRpcError:
    """The same refusal from both RPCs."""
    with pytest.raises(grpc.aio.AioRpcError) as unary:
        await server.generation.Generate(request)
    with pytest.raises(grpc.aio.AioRpcError) as stream:
        await server.generation.GenerateStream(request).read()
    assert unary.value.code() == stream.value.code()
    assert unary.value.details() == stream.value.details()
    return unary.value


def test_each_bad_field_is_named_and_the_server_goes_on() -> None:
    async def main() -> None:
        engine = FakeEngine()
        async with serving(engine) as server:
            for request, field, parts in BAD:
                error = await refused(server, request)
                message = error.details() or ""
                assert error.code() == INVALID, message
                assert field_of(error) == field, message
                assert message.startswith(f"{field}"), message
                assert [part for part in parts if part not in message] == [], message
            assert not engine.requests
            assert (await server.generation.Generate(text())).text

    asyncio.run(main())


@pytest.mark.parametrize(
    ("request_", "code", "part"),
    [
        (TokenizeRequest(), INVALID, "not set"),
        (TokenizeRequest(text=""), INVALID, "text: is empty"),
        (adapters_pb2.LoadAdapterRequest(name="b ad", source="/x"), INVALID, "name: 'b ad' is not a name"),
        (adapters_pb2.LoadAdapterRequest(name="a", source=""), INVALID, "source: '' is not a source"),
        (adapters_pb2.LoadAdapterRequest(name="a", source="a\x00b"), INVALID, "is not a source"),
        (adapters_pb2.LoadAdapterRequest(name="a", source="a" * 5000), INVALID, "allowed are 1 to 4096 bytes"),
        (
            adapters_pb2.LoadAdapterRequest(name="a", source="/x", on_conflict=9),  # type: ignore[arg-type]
            INVALID,
            "on_conflict: 9 is unknown; allowed are FAIL, REPLACE",
        ),
        (
            adapters_pb2.UnloadAdapterRequest(name="a", mode=7),  # type: ignore[arg-type]
            INVALID,
            "mode: 7 is unknown; allowed are DRAIN, ABORT",
        ),
        (adapters_pb2.GetAdapterRequest(), INVALID, "name: '' is not a name"),
        (adapters_pb2.GetAdapterRequest(name="nope"), grpc.StatusCode.NOT_FOUND, "'nope' is not loaded"),
        (adapters_pb2.UpdateAdapterRequest(name="a"), INVALID, "pinned: is not set"),
        (adapters_pb2.UpdateAdapterRequest(name="a b", pinned=True), INVALID, "name: 'a b' is not a name"),
        (
            adapters_pb2.UpdateAdapterRequest(name="nope", pinned=True),
            grpc.StatusCode.NOT_FOUND,
            "'nope' is not loaded",
        ),
        (
            adapters_pb2.UpdateAdapterRequest(name="a", resident_mode=adapters_pb2.MERGED),
            grpc.StatusCode.UNIMPLEMENTED,
            "resident_mode",
        ),
        (adapters_pb2.MergeAdaptersRequest(name="a"), grpc.StatusCode.UNIMPLEMENTED, "MergeAdapters"),
        (adapters_pb2.ExportAdapterRequest(name="a"), grpc.StatusCode.UNIMPLEMENTED, "ExportAdapter"),
    ],
)
def test_other_rpcs(request_: object, code: grpc.StatusCode, part: str) -> None:
    async def main() -> grpc.aio.AioRpcError:
        async with serving() as server:
            rpcs: dict[type, Callable[..., object]] = {
                TokenizeRequest: server.generation.Tokenize,
                adapters_pb2.LoadAdapterRequest: server.adapters.LoadAdapter,
                adapters_pb2.UnloadAdapterRequest: server.adapters.UnloadAdapter,
                adapters_pb2.GetAdapterRequest: server.adapters.GetAdapter,
                adapters_pb2.UpdateAdapterRequest: server.adapters.UpdateAdapter,
                adapters_pb2.MergeAdaptersRequest: server.adapters.MergeAdapters,
                adapters_pb2.ExportAdapterRequest: lambda pb: server.adapters.ExportAdapter(pb).read(),
            }
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rpcs[type(request_)](request_)  # type: ignore[misc]
            return caught.value

    error = asyncio.run(main())
    assert error.code() == code
    assert part in (error.details() or "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Mismatch("adapter 'a': shape"), grpc.StatusCode.FAILED_PRECONDITION),
        (NonFinite("adapter 'a': logits"), grpc.StatusCode.FAILED_PRECONDITION),
        (UnsupportedFeature("use_dora"), grpc.StatusCode.UNIMPLEMENTED),
        (NotPermitted("outside"), grpc.StatusCode.PERMISSION_DENIED),
        (Unavailable("gone"), grpc.StatusCode.UNAVAILABLE),
        (OverCapacity("queue full", retry_after_s=1.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
@pytest.mark.parametrize("after", [0, 2])
def test_engine_failures_keep_their_code_and_message(error: LoraplexError, code: grpc.StatusCode, after: int) -> None:
    async def main() -> None:
        engine = FakeEngine()
        async with serving(engine) as server:
            engine.fail_after = (after, error)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in server.generation.GenerateStream(text()):
                    pass
            assert caught.value.code() == code
            assert caught.value.details() == str(error)
            retry = error_details_pb2.RetryInfo()
            found = [detail.Unpack(retry) for detail in details_of(caught.value).details]
            assert any(found) == (error.retry_after_s > 0)
            assert retry.retry_delay.ToNanoseconds() == error.retry_after_s * 1e9
            engine.fail_after = None
            assert (await server.generation.Generate(text())).text

    asyncio.run(main())


def test_a_bug_is_internal_with_the_request_id_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> grpc.aio.AioRpcError:
        engine = FakeEngine()
        engine.fail_after = (1, ZeroDivisionError("secret detail"))
        async with serving(engine) as server:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await server.generation.Generate(text(request_id="req-7"))
            return caught.value

    error = asyncio.run(main())
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "req-7" in (error.details() or "")
    assert "secret" not in (error.details() or "")
    records = [record for record in caplog.records if "req-7" in record.getMessage()]
    assert len(records) == 1
    assert records[0].exc_info is not None


def test_long_messages_fit_the_trailers() -> None:
    async def main() -> grpc.aio.AioRpcError:
        engine = FakeEngine()
        engine.fail_after = (0, Mismatch("é" * 100_000))
        async with serving(engine) as server:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await server.generation.Generate(text())
            return caught.value

    error = asyncio.run(main())
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert (error.details() or "").endswith("é...")


def test_messages_over_the_limit_are_refused_by_the_transport() -> None:
    async def main() -> None:
        async with serving() as server:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await server.generation.Generate(GenerateRequest(text="x" * (1 << 20)))
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (await server.generation.Generate(text())).text

    asyncio.run(main())
