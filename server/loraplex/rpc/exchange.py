"""One generation as a caller asked for it: made ready with its adapters' own text, and again when that changed.

Between making a prompt's token ids and running them, an adapter may be replaced by a version with another tokenizer.
The engine tells by the digest in the request, refuses it as Unavailable, and the prompt is made anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Final

import msgspec

from loraplex.engine.messages import TokenEvent
from loraplex.errors import Unavailable
from loraplex.metrics import RequestMeter
from loraplex.rpc import convert
from loraplex.rpc.serving import Serving
from loraplex.rpc.transcript import Transcript
from loraplex.text.adapter_text import RequestText
from loraplex.types import STALE_TEXT, Request
from loraplex_proto.v1 import generation_pb2

#: how often a prompt is made anew before its caller is told to come back
_MAX_ANEW: Final = 8


class Exchange:
    """``prepare`` first. ``request``, ``transcript`` and ``text`` are those of the latest preparation: ``events`` may
    prepare again before its first event, and never after.
    """

    request: Request
    transcript: Transcript
    text: RequestText

    def __init__(self, pb: generation_pb2.GenerateRequest, request_id: str, serving: Serving, meter: RequestMeter):
        self._pb = pb
        self._request_id = request_id
        self._serving = serving
        self._meter = meter
        self._adapters = convert.adapter_refs(pb)

    async def prepare(self) -> None:
        """Check every field and tokenize the prompt, with the text of the adapters as they are now."""
        serving = self._serving
        self.text = text = await serving.texts.of([ref.name for ref in self._adapters])
        model = msgspec.structs.replace(
            serving.engine.model, vocab_size=text.vocab_size, eos_token_ids=text.eos_token_ids
        )
        draft = convert.draft(self._pb, self._request_id, model, serving.default_max_tokens)
        if text.sampling is not None and not self._pb.HasField("sampling"):
            draft = replace(draft, sampling=text.sampling)
        self._meter.named(tuple(adapter.name for adapter in draft.adapters), exist=False)
        request = draft.request(await token_ids(draft.prompt, text), model.max_model_len)
        self.request = msgspec.structs.replace(request, text_digest=text.digest)
        self.transcript = Transcript(self.request, model.eos_token_ids, text.tokenizer, self._meter)

    async def events(self) -> AsyncGenerator[TokenEvent]:
        """The engine's events; closing it ends the generation."""
        for attempt in range(_MAX_ANEW + 1):
            stream = self._serving.engine.generate(self.request)
            try:
                async with contextlib.aclosing(stream):
                    async for event in stream:
                        yield event
                return
            except Unavailable as error:
                if error.field != STALE_TEXT:
                    raise
                if attempt == _MAX_ANEW:  # the caller has no such field to mend
                    raise Unavailable(str(error), retry_after_s=error.retry_after_s) from None
            await self.prepare()


async def token_ids(prompt: convert.Prompt, text: RequestText) -> tuple[int, ...]:
    """The token ids of a prompt."""
    if prompt.token_ids is not None:
        return prompt.token_ids
    if prompt.chat is not None:
        return await text.tokenizer.encode_chat(prompt.chat)
    assert prompt.text is not None
    return await text.tokenizer.encode(prompt.text)
