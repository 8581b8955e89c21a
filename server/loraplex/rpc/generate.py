"""GenerationService: checks, tokenizes, runs the engine, and answers whole or as a stream."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

import grpc

from loraplex.engine.handle import EngineHandle
from loraplex.errors import InternalError
from loraplex.metrics import Metrics, RequestMeter
from loraplex.rpc import convert
from loraplex.rpc.feed import EventFeed, StreamWriter
from loraplex.rpc.gate import Gate
from loraplex.rpc.status import Call, Context, code_of, guarded
from loraplex.rpc.transcript import Piece, Transcript
from loraplex.text.tokenizer import Tokenizer
from loraplex.types import Request
from loraplex_proto.v1 import generation_pb2, generation_pb2_grpc

#: a client whose deadline passes cancels the call, and that may arrive before the deadline passes here
_DEADLINE_SLACK_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Serving:
    """What every service needs of the server it is part of."""

    engine: EngineHandle
    tokenizer: Tokenizer
    metrics: Metrics
    gate: Gate
    default_max_tokens: int


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
                return generation_pb2.TokenizeResponse(token_ids=await self._token_ids(prompt))
        raise AssertionError("guarded ends every failed call")

    async def _generate(
        self, pb: generation_pb2.GenerateRequest, call: Call, meter: RequestMeter
    ) -> generation_pb2.GenerateResponse:
        request, transcript = await self._admit(pb, call, meter)
        response = generation_pb2.GenerateResponse(request_id=request.request_id)
        text: list[str] = []
        async with contextlib.aclosing(self._serving.engine.generate(request)) as events:
            async for event in events:
                piece = transcript.take((event,))
                text.append(piece.text)
                self._fill(response, piece, request)
                if piece.finish is not None:
                    response.text = "".join(text)
                    return response
        raise InternalError("the engine's events ended without a finish")

    async def _stream(
        self, pb: generation_pb2.GenerateRequest, writer: StreamWriter, call: Call, meter: RequestMeter
    ) -> None:
        request, transcript = await self._admit(pb, call, meter)
        feed = EventFeed(self._serving.engine.generate(request), writer)
        try:
            await writer.open()
            while events := await feed.ready():
                piece = transcript.take(events)
                chunk = generation_pb2.GenerateChunk(text=piece.text)
                self._fill(chunk, piece, request)
                if chunk.ByteSize() == 0:  # all text is held back
                    continue
                chunk.request_id = request.request_id
                if piece.finish is not None:
                    # The engine's part ends before the last write, which may wait for the reader.
                    await feed.close()
                await writer.write(chunk)
                if piece.finish is not None:
                    return
        finally:
            await feed.close()
        raise InternalError("the engine's events ended without a finish")

    async def _admit(
        self, pb: generation_pb2.GenerateRequest, call: Call, meter: RequestMeter
    ) -> tuple[Request, Transcript]:
        serving = self._serving
        model = serving.engine.model
        call.request_id = convert.request_id(pb)
        draft = convert.draft(pb, call.request_id, model, serving.default_max_tokens)
        meter.named(tuple(adapter.name for adapter in draft.adapters), exist=False)
        request = draft.request(await self._token_ids(draft.prompt), model.max_model_len)
        return request, Transcript(request, model.eos_token_ids, serving.tokenizer, meter)

    async def _token_ids(self, prompt: convert.Prompt) -> tuple[int, ...]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        if prompt.chat is not None:
            return await self._serving.tokenizer.encode_chat(prompt.chat)
        assert prompt.text is not None
        return await self._serving.tokenizer.encode(prompt.text)

    def _fill(
        self,
        message: generation_pb2.GenerateResponse | generation_pb2.GenerateChunk,
        piece: Piece,
        request: Request,
    ) -> None:
        """Add all of a piece but its text."""
        token_text = self._serving.tokenizer.token_text
        if request.output.token_ids:
            message.token_ids.extend(piece.token_ids)
        if piece.logprobs:
            message.logprobs.extend(convert.logprobs(piece.logprobs, token_text))
        if piece.prompt_logprobs:
            message.prompt_logprobs.extend(convert.logprobs(piece.prompt_logprobs, token_text))
        if piece.adapters:
            message.adapters.extend(convert.resolved(piece.adapters))
        if piece.finish is not None:
            assert piece.usage is not None
            message.finish_reason = convert.finish_reason(piece.finish)
            message.usage.CopyFrom(convert.usage(piece.usage))

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
