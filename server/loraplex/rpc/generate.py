"""GenerationService: checks, tokenizes, runs the engine, and answers whole or as a stream."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final

import grpc

from loraplex.errors import InternalError
from loraplex.metrics import RequestMeter
from loraplex.rpc import convert
from loraplex.rpc.exchange import Exchange, token_ids
from loraplex.rpc.feed import EventFeed, StreamWriter
from loraplex.rpc.serving import Serving
from loraplex.rpc.status import Call, Context, code_of, guarded
from loraplex.rpc.transcript import Piece
from loraplex.types import ROUTER_PREFIX
from loraplex_proto.v1 import generation_pb2, generation_pb2_grpc

#: a client whose deadline passes cancels the call, and that may arrive before the deadline passes here
_DEADLINE_SLACK_S: Final = 0.1


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Generate, GenerateStream and Tokenize."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        async with guarded(context) as call:
            with self._serving.gate.enter():
                async with self._measured(context) as meter:
                    return await self._generate(request, call, meter)
        raise AssertionError("guarded ends every failed call")

    async def GenerateStream(self, request: generation_pb2.GenerateRequest, context: Context) -> None:
        async with guarded(context) as call:
            with self._serving.gate.enter():
                async with self._measured(context) as meter:
                    await self._stream(request, StreamWriter(context), call, meter)

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: Context
    ) -> generation_pb2.TokenizeResponse:
        async with guarded(context):
            with self._serving.gate.enter():
                prompt = convert.tokenize_prompt(request)
                names = [ref.name for ref in convert.adapter_refs(request)]
                for name in names:  # one that is not there is refused, as in Generate; a router is sent the base's ids
                    await self._serving.engine.get_adapter(name.removeprefix(ROUTER_PREFIX))
                text = await self._serving.texts.of(names)
                return generation_pb2.TokenizeResponse(token_ids=await token_ids(prompt, text))
        raise AssertionError("guarded ends every failed call")

    async def _generate(
        self, pb: generation_pb2.GenerateRequest, call: Call, meter: RequestMeter
    ) -> generation_pb2.GenerateResponse:
        exchange = await self._admit(pb, call, meter)
        response = generation_pb2.GenerateResponse(request_id=call.request_id)
        text: list[str] = []
        async with contextlib.aclosing(exchange.events()) as events:
            async for event in events:
                piece = exchange.transcript.take((event,))
                text.append(piece.text)
                _fill(response, piece, exchange)
                if piece.finish is not None:
                    response.text = "".join(text)
                    return response
        raise InternalError("the engine's events ended without a finish")

    async def _stream(
        self, pb: generation_pb2.GenerateRequest, writer: StreamWriter, call: Call, meter: RequestMeter
    ) -> None:
        exchange = await self._admit(pb, call, meter)
        feed = EventFeed(exchange.events(), writer)
        try:
            await writer.open()
            while events := await feed.ready():
                piece = exchange.transcript.take(events)
                chunk = generation_pb2.GenerateChunk(text=piece.text)
                _fill(chunk, piece, exchange)
                if chunk.ByteSize() == 0:  # all text is held back
                    continue
                chunk.request_id = call.request_id
                if piece.finish is not None:
                    # The engine's part ends before the last write, which may wait for the reader.
                    await feed.close()
                await writer.write(chunk)
                if piece.finish is not None:
                    return
        finally:
            await feed.close()
        raise InternalError("the engine's events ended without a finish")

    async def _admit(self, pb: generation_pb2.GenerateRequest, call: Call, meter: RequestMeter) -> Exchange:
        call.request_id = convert.request_id(pb)
        exchange = Exchange(pb, call.request_id, self._serving, meter)
        await exchange.prepare()
        return exchange

    @contextlib.asynccontextmanager
    async def _measured(self, context: Context) -> AsyncIterator[RequestMeter]:
        """Count the request, with the status code it ends with."""
        meter = self._serving.metrics.request()
        code = grpc.StatusCode.OK
        try:
            yield meter
        except BaseException as error:
            code = code_of(error)
            left = context.time_remaining()
            if code is grpc.StatusCode.CANCELLED and left is not None and left < _DEADLINE_SLACK_S:
                code = grpc.StatusCode.DEADLINE_EXCEEDED
            raise
        finally:
            meter.end(code.name)


def _fill(
    message: generation_pb2.GenerateResponse | generation_pb2.GenerateChunk, piece: Piece, exchange: Exchange
) -> None:
    """Add all of a piece but its text."""
    token_text = exchange.text.tokenizer.token_text
    if exchange.request.output.token_ids:
        message.token_ids.extend(piece.token_ids)
    if piece.logprobs:
        message.logprobs.extend(convert.logprobs(piece.logprobs, token_text))
    if piece.prompt_logprobs:
        message.prompt_logprobs.extend(convert.logprobs(piece.prompt_logprobs, token_text))
    if piece.adapters:
        message.adapters.extend(convert.resolved(piece.adapters))
    if piece.routing is not None:
        message.routing.CopyFrom(convert.routing(piece.routing))
    if piece.finish is not None:
        assert piece.usage is not None
        message.finish_reason = convert.finish_reason(piece.finish)
        message.usage.CopyFrom(convert.usage(piece.usage))
