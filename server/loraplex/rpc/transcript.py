"""What one request has said so far: engine events in, pieces of the answer out. Knows neither gRPC nor protobuf."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from loraplex.engine.messages import TokenEvent
from loraplex.metrics import RequestMeter
from loraplex.text.detokenize import StopText
from loraplex.text.tokenizer import Tokenizer
from loraplex.types import FinishReason, Request, ResolvedAdapter, Routing, TokenLogprob, Usage


@dataclass(slots=True)
class Piece:
    """What some events add to the answer. ``usage`` comes with ``finish``."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    adapters: tuple[ResolvedAdapter, ...] = ()
    routing: Routing | None = None
    finish: FinishReason | None = None
    usage: Usage | None = None


class Transcript:
    """Turns one request's events into text, cutting at stop strings and stop tokens, and measures it.

    Tokens after the one that completes a stop string are dropped, and its finish is STOP.
    """

    def __init__(self, request: Request, eos_token_ids: tuple[int, ...], tokenizer: Tokenizer, meter: RequestMeter):
        self._request = request
        self._tokenizer = tokenizer
        self._meter = meter
        rule = request.stop
        self._detokenizer = tokenizer.detokenizer(StopText(rule.stop, rule.min_tokens, request.output.include_stop))
        self._stop_ids = frozenset(rule.stop_token_ids) | frozenset(() if rule.ignore_eos else eos_token_ids)
        self._started = False
        self._num_tokens = 0
        self._engine_usage = Usage()

    def take(self, events: Iterable[TokenEvent]) -> Piece:
        """What ``events`` add. Nothing may follow a piece with ``finish``."""
        piece = Piece()
        for event in events:
            self._take_one(event, piece)
            if piece.finish is not None:
                break
        self._num_tokens += len(piece.token_ids)
        self._meter.tokens(len(piece.token_ids))
        if piece.finish is not None:
            piece.usage = self._usage()
            self._meter.usage = piece.usage
        return piece

    def _take_one(self, event: TokenEvent, piece: Piece) -> None:
        if not self._started:
            self._started = True
            piece.adapters = event.adapters
            piece.routing = event.routing
            self._meter.named(tuple(adapter.name for adapter in event.adapters), exist=True)
        if event.usage is not None:
            self._engine_usage = event.usage
        if event.prompt_logprobs:
            piece.prompt_logprobs = event.prompt_logprobs
        token_ids = event.token_ids
        ended_by_token = event.finish is FinishReason.STOP and bool(token_ids) and token_ids[-1] in self._stop_ids
        text, num_used = self._detokenizer.push(token_ids[:-1] if ended_by_token else token_ids)
        piece.text += text
        if self._detokenizer.stopped:
            token_ids = token_ids[:num_used]
            piece.finish = FinishReason.STOP
        else:
            piece.finish = event.finish
        piece.token_ids += token_ids
        piece.logprobs += event.logprobs[: len(token_ids)]
        if piece.finish is not None and not self._detokenizer.stopped:
            piece.text += self._detokenizer.flush()
            if ended_by_token and self._request.output.include_stop:
                piece.text += self._tokenizer.token_text(token_ids[-1])

    def _usage(self) -> Usage:
        """The engine knows the queue and the cache; tokens kept and times as the caller sees them are ours."""
        known = self._engine_usage
        return Usage(
            prompt_tokens=len(self._request.prompt_token_ids),
            cached_prompt_tokens=known.cached_prompt_tokens,
            completion_tokens=self._num_tokens,
            queue_s=known.queue_s,
            ttft_s=self._meter.ttft_s,
            total_s=time.monotonic() - self._meter.arrived_at,
        )
