"""Cancellation, deadlines, stalled and killed readers, drain, health, reflection: nothing is held for who is gone."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from loraplex.config import ServerConfig
from loraplex.errors import InvalidConfig, NotFound
from loraplex.logs import GRPC_SERVER, set_up_logging
from loraplex.metrics import Metrics
from loraplex.rpc import feed
from loraplex.rpc.app import SERVICES, App
from loraplex.rpc.status import Context, guarded
from loraplex_proto.v1 import adapters_pb2, generation_pb2, generation_pb2_grpc
from loraplex_proto.v1.generation_pb2 import GenerateRequest, StopRule
from tests.fakes import FAKE_MODEL, FakeEngine
from tests.rpc.serving import CONFIG, Served, make_tokenizer, serving

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def slow_engine(step_s: float = 0.01, max_model_len: int = 100_000) -> FakeEngine:
    engine = FakeEngine(msgspec.structs.replace(FAKE_MODEL, max_model_len=max_model_len))
    engine.step_s = step_s
    return engine


def long_request(request_id: str = "long", max_tokens: int = 50_000) -> GenerateRequest:
    return GenerateRequest(request_id=request_id, text="hi", stop=StopRule(max_tokens=max_tokens))


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


async def drained(call: grpc.aio.UnaryStreamCall[GenerateRequest, generation_pb2.GenerateChunk]) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def health_of(server: Served, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(server.channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


@pytest.mark.parametrize("unary", [True, False])
def test_cancellation_frees_the_engine_within_a_step(unary: bool) -> None:
    async def main() -> None:
        engine = slow_engine()
        async with serving(engine) as server:
            rpc = server.generation.Generate if unary else server.generation.GenerateStream
            call = rpc(long_request())
            await until(lambda: bool(engine.running))
            call.cancel()
            began = time.monotonic()
            await until(lambda: engine.aborted == ["long"])
            assert time.monotonic() - began < 1.0
            assert not engine.running

    asyncio.run(main())


@pytest.mark.parametrize("unary", [True, False])
def test_deadline_frees_the_engine(unary: bool) -> None:
    async def main() -> None:
        engine = slow_engine()
        async with serving(engine) as server:
            rpc = server.generation.Generate if unary else server.generation.GenerateStream
            call = rpc(long_request(), timeout=0.2)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (call if unary else drained(call))
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: not engine.running)
            assert engine.aborted == ["long"]

    asyncio.run(main())


#: of a channel that takes no more of a stream unread than the 64 KiB that HTTP/2 begins with; left alone, it asks for
#: more the faster the server sends, and how much piles up before anybody stalls is a matter of luck
TAKES_LITTLE = [("grpc.http2.bdp_probe", 0)]


def test_a_reader_that_stalls_is_ended_and_its_neighbours_go_on() -> None:
    async def main() -> None:
        engine = slow_engine(step_s=0.002, max_model_len=10_000_000)
        engine.tokens_per_event = 400
        request = long_request(max_tokens=5_000_000)
        request.output.token_ids = True
        request.output.logprobs = 1
        async with serving(engine) as server, grpc.aio.insecure_channel(server.app.address, TAKES_LITTLE) as channel:
            call = generation_pb2_grpc.GenerationServiceStub(channel).GenerateStream(request)
            await call.read()
            await until(lambda: engine.aborted == ["long"], timeout_s=20.0)
            engine.tokens_per_event = 1
            assert (await server.generation.Generate(long_request("other", max_tokens=5))).text
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await drained(call)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "stalled" in (caught.value.details() or "")

    asyncio.run(main())


class _DeafContext:
    """A context whose reader takes nothing."""

    async def write(self, message: object) -> None:
        await asyncio.Event().wait()


def test_a_write_without_progress_ends_after_the_stall_time() -> None:
    async def main() -> None:
        writer = feed.StreamWriter(_DeafContext(), stall_s=0.05)  # type: ignore[arg-type]
        with pytest.raises(feed.OverCapacity, match="stalled"):
            await writer.write(generation_pb2.GenerateChunk())

    asyncio.run(main())


class _GoneContext:
    """A context whose caller went: nothing can be sent any more."""

    async def abort(self, *status: object) -> None:
        raise grpc.aio.InternalError("execute_batch")

    send_initial_metadata = write = abort


async def _told_of_an_error(context: Context) -> None:
    async with guarded(context):
        raise NotFound("no such adapter")


async def _sent_headers(context: Context) -> None:
    async with guarded(context):
        await feed.StreamWriter(context).open()


async def _sent_a_message(context: Context) -> None:
    async with guarded(context):
        await feed.StreamWriter(context).write(generation_pb2.GenerateChunk())


@pytest.mark.parametrize("send", [_told_of_an_error, _sent_headers, _sent_a_message])
def test_what_nobody_is_left_to_hear_is_a_cancellation(
    send: Callable[[Context], Coroutine[None, None, None]], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(send(_GoneContext()))  # type: ignore[arg-type]
    assert caplog.records == []


def test_the_library_logs_no_traceback_for_a_caller_that_went() -> None:
    logger = logging.getLogger(GRPC_SERVER)
    before = list(logger.filters)
    error = type("ExecuteBatchError", (grpc.aio.InternalError,), {})("Failed 'execute_batch'")
    try:
        set_up_logging("text", "info")
        assert [logger.filter(_record(each)) for each in (error, ValueError("a bug"), None)] == [False, True, True]
    finally:
        for each in set(logger.filters) - set(before):
            logger.removeFilter(each)


def _record(error: Exception | None) -> logging.LogRecord:
    told = (type(error), error, None) if error else None
    return logging.LogRecord(GRPC_SERVER, logging.ERROR, __file__, 1, "raised in core", (), told)


def _read_a_little_and_hang(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stream = generation_pb2_grpc.GenerationServiceStub(channel).GenerateStream(long_request("victim"))
        next(stream)
        time.sleep(60)


def test_a_killed_client_frees_the_engine() -> None:
    async def main() -> None:
        engine = slow_engine(step_s=0.001)
        async with serving(engine) as server:
            spawn = multiprocessing.get_context("spawn")
            client = spawn.Process(target=_read_a_little_and_hang, args=(server.app.address,))
            client.start()
            await until(lambda: bool(engine.running), timeout_s=30.0)
            await asyncio.sleep(0.1)
            client.kill()
            await until(lambda: engine.aborted == ["victim"])
            await asyncio.to_thread(client.join)
            client.close()

    asyncio.run(main())


def test_drain_lets_running_requests_finish_and_refuses_new_ones() -> None:
    async def main() -> None:
        engine = slow_engine()
        async with serving(engine) as server:
            running = asyncio.ensure_future(server.generation.Generate(long_request(max_tokens=30)))
            await until(lambda: bool(engine.running))
            drain = asyncio.create_task(server.app.drain())
            await asyncio.sleep(0.02)
            assert await health_of(server) == NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await server.generation.Generate(long_request("late"))
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "draining" in (caught.value.details() or "")
            assert not drain.done()
            response = await running
            assert response.usage.completion_tokens == 30
            await asyncio.wait_for(drain, 1.0)
            assert not engine.aborted

    asyncio.run(main())


def test_drain_ends_what_takes_too_long() -> None:
    async def main() -> None:
        engine = slow_engine()
        async with serving(engine, msgspec.structs.replace(CONFIG, drain_s=0.1)) as server:
            running = asyncio.ensure_future(server.generation.Generate(long_request()))
            watch = server.adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest())
            await until(lambda: bool(engine.running))
            await server.app.drain()
            await server.app.stop()
            with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
                await running
            await until(lambda: engine.aborted == ["long"])
            watch.cancel()

    asyncio.run(main())


@pytest.mark.parametrize(("signals", "limit_s"), [((signal.SIGTERM,), 10.0), ((signal.SIGINT, signal.SIGTERM), 3.0)])
def test_signals_drain_and_a_second_one_ends_at_once(signals: tuple[int, ...], limit_s: float) -> None:
    async def main() -> None:
        engine = slow_engine()
        app = App(msgspec.structs.replace(CONFIG, drain_s=8.0), engine, make_tokenizer(), Metrics())
        await app.start()
        run = asyncio.create_task(app.run())
        async with grpc.aio.insecure_channel(app.address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            max_tokens = 50 if len(signals) == 1 else 50_000
            running = asyncio.ensure_future(stub.Generate(long_request(max_tokens=max_tokens)))
            await until(lambda: bool(engine.running))
            began = time.monotonic()
            for number in signals:
                os.kill(os.getpid(), number)
                await asyncio.sleep(0.05)
            assert await asyncio.wait_for(run, 15.0) == 0
            assert time.monotonic() - began < limit_s
            if len(signals) == 1:
                assert (await running).usage.completion_tokens == 50
            else:
                with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
                    await running

    asyncio.run(main())


def test_engine_death_ends_requests_unavailable_and_health_not_serving() -> None:
    async def main() -> None:
        engine = slow_engine()
        async with serving(engine) as server:
            assert [await health_of(server, name) for name in ("", *SERVICES)] == [SERVING] * 4
            running = server.generation.GenerateStream(long_request())
            await running.read()
            engine.die("exit code -9")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await drained(running)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await server.generation.Generate(long_request())
            assert late.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "exit code -9" in (late.value.details() or "")
            assert [await health_of(server, name) for name in ("", *SERVICES)] == [NOT_SERVING] * 4
            run = asyncio.create_task(server.app.run())
            await asyncio.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)
            assert await run == 1

    asyncio.run(main())


def test_unknown_service_has_no_health() -> None:
    async def main() -> None:
        async with serving() as server:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health_of(server, "nope")
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND

    asyncio.run(main())


def test_too_many_calls_are_refused_with_a_retry() -> None:
    async def main() -> None:
        engine = slow_engine()
        async with serving(engine, msgspec.structs.replace(CONFIG, max_concurrent_streams=2)) as server:
            first = [server.generation.GenerateStream(long_request(str(i))) for i in range(2)]
            await until(lambda: len(engine.running) == 2)
            async with grpc.aio.insecure_channel(server.app.address, options=[("x", 1)]) as other:
                stub = generation_pb2_grpc.GenerationServiceStub(other)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Generate(long_request())
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            for call in first:
                call.cancel()
            await until(lambda: not engine.running)
            assert (await server.generation.Generate(long_request(max_tokens=2))).text

    asyncio.run(main())


async def _reflected(server: Served) -> set[str]:
    async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        yield reflection_pb2.ServerReflectionRequest(file_containing_symbol="loraplex.v1.GenerationService")

    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    answers = [answer async for answer in stub.ServerReflectionInfo(ask())]
    assert answers[1].file_descriptor_response.file_descriptor_proto
    return {service.name for service in answers[0].list_services_response.service}


def test_reflection_lists_every_service_and_can_be_off() -> None:
    async def main() -> None:
        async with serving() as server:
            names = await _reflected(server)
            assert names == {*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        async with serving(config=msgspec.structs.replace(CONFIG, reflection=False)) as server:
            call = reflection_pb2_grpc.ServerReflectionStub(server.channel).ServerReflectionInfo()
            assert await call.code() == grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(main())


def test_a_taken_port_is_named() -> None:
    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            app = App(ServerConfig(port=port), FakeEngine(), make_tokenizer(), Metrics())
            with pytest.raises(InvalidConfig, match=f"cannot listen on 127.0.0.1:{port}"):
                await app.start()
            await app.stop()

    asyncio.run(main())


def test_a_burst_is_not_a_stall() -> None:
    """More than the buffer at once, as prompt logprobs of a long prompt are, to a reader that reads."""

    async def main() -> None:
        engine = slow_engine(step_s=0.0)
        engine.tokens_per_event = 10_000
        async with serving(engine) as server:
            request = long_request(max_tokens=40_000)
            request.output.token_ids = True
            parts = [chunk async for chunk in server.generation.GenerateStream(request)]
        assert sum(len(part.token_ids) for part in parts) == 40_000

    asyncio.run(main())
