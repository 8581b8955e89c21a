"""Protobuf to our types and back, for requests, answers and the model (``convert_adapters`` has the life of adapters):
the one place that knows both. Every request field is checked here.

Does not tokenize, call the engine or know status codes. All checks raise InvalidRequest.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from loraplex import __version__
from loraplex.rpc import limits
from loraplex.types import (
    MAX_ADAPTERS_PER_REQUEST,
    MAX_CHAT_MESSAGES,
    MAX_LOGPROBS,
    MAX_PROMPT_BYTES,
    MAX_STOP_STRING_BYTES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    AdapterRef,
    FinishReason,
    ModelInfo,
    OutputOptions,
    Request,
    ResolvedAdapter,
    SamplingParams,
    StopRule,
    TokenLogprob,
    Usage,
)
from loraplex_proto.v1 import generation_pb2, model_pb2

#: temperatures below this overflow float32 logits; 0 is greedy
MIN_TEMPERATURE: Final = 1e-3
MAX_TEMPERATURE: Final = 100.0
MAX_REPETITION_PENALTY: Final = 100.0
#: presence and frequency penalties lie in [-MAX_PENALTY, MAX_PENALTY]
MAX_PENALTY: Final = 2.0
MAX_ADAPTER_WEIGHT: Final = 100.0
MAX_ROLE_BYTES: Final = 64

_FINISH: Final = {
    FinishReason.STOP: generation_pb2.STOP,
    FinishReason.LENGTH: generation_pb2.LENGTH,
    FinishReason.CANCELLED: generation_pb2.CANCELLED,
}

ChatMessages = tuple[tuple[str, str], ...]
TokenText = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as it came: exactly one of the three is set."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    chat: ChatMessages | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """A GenerateRequest whose every field is in range; only the prompt's tokens are still to come."""

    request_id: str
    prompt: Prompt
    adapters: tuple[AdapterRef, ...]
    sampling: SamplingParams
    stop: StopRule
    output: OutputOptions
    priority: int

    def request(self, prompt_token_ids: tuple[int, ...], max_model_len: int) -> Request:
        """The engine's Request: the prompt must leave room for a token, and max_tokens is cut to the room there is."""
        num_prompt = len(prompt_token_ids)
        if num_prompt == 0:
            limits.refuse("prompt", "is empty; it must have at least one token")
        room = max_model_len - num_prompt
        if room < 1:
            limits.refuse("prompt", f"has {num_prompt} tokens; at most {max_model_len - 1} are allowed by this model")
        stop = self.stop
        limits.at_most("stop.min_tokens", stop.min_tokens, room)
        if stop.max_tokens > room:
            stop = StopRule(room, stop.min_tokens, stop.stop, stop.stop_token_ids, stop.ignore_eos)
        return Request(
            self.request_id, prompt_token_ids, self.adapters, self.sampling, stop, self.output, self.priority
        )


def request_id(pb: generation_pb2.GenerateRequest) -> str:
    """The caller's request id, checked, or a new one."""
    return limits.name("request_id", pb.request_id) if pb.request_id else uuid.uuid4().hex


def draft(pb: generation_pb2.GenerateRequest, known_as: str, model: ModelInfo, default_max_tokens: int) -> Draft:
    """Check every field of a GenerateRequest against its limits and the model's vocabulary."""
    return Draft(
        request_id=known_as,
        prompt=_prompt(pb, model),
        adapters=adapter_refs(pb),
        sampling=_sampling(pb.sampling, model),
        stop=_stop(pb.stop, model, default_max_tokens),
        output=OutputOptions(
            logprobs=limits.at_most("output.logprobs", pb.output.logprobs, min(MAX_LOGPROBS, model.vocab_size)),
            prompt_logprobs=pb.output.prompt_logprobs,
            token_ids=pb.output.token_ids,
            include_stop=pb.output.include_stop,
        ),
        priority=pb.priority,
    )


def tokenize_prompt(pb: generation_pb2.TokenizeRequest) -> Prompt:
    """The prompt of a TokenizeRequest."""
    match pb.WhichOneof("prompt"):
        case "text":
            return Prompt(text=_text(pb.text))
        case "chat":
            return Prompt(chat=_chat(pb.chat))
        case _:
            raise limits.refusal("prompt", "is not set; send one of text, chat")


def adapter_refs(pb: generation_pb2.GenerateRequest | generation_pb2.TokenizeRequest) -> tuple[AdapterRef, ...]:
    """The adapters of a request, each once."""
    limits.count("adapters", len(pb.adapters), MAX_ADAPTERS_PER_REQUEST)
    refs: dict[str, AdapterRef] = {}
    for item in pb.adapters:
        name = limits.name("adapters.name", item.name)
        if name in refs:
            limits.refuse("adapters.name", f"{name!r} stands there twice; give it once, with the sum of its weights")
        weight = item.weight if item.HasField("weight") else 1.0
        limits.number("adapters.weight", weight, -MAX_ADAPTER_WEIGHT, MAX_ADAPTER_WEIGHT)
        refs[name] = AdapterRef(name, weight)
    return tuple(refs.values())


def finish_reason(reason: FinishReason) -> generation_pb2.FinishReason:
    """A finish reason on the wire."""
    return _FINISH[reason]


def usage(value: Usage) -> generation_pb2.Usage:
    """Usage on the wire."""
    return generation_pb2.Usage(
        prompt_tokens=value.prompt_tokens,
        cached_prompt_tokens=value.cached_prompt_tokens,
        completion_tokens=value.completion_tokens,
        queue_s=value.queue_s,
        ttft_s=value.ttft_s,
        total_s=value.total_s,
    )


def logprobs(values: Iterable[TokenLogprob], text: TokenText) -> list[generation_pb2.TokenLogprob]:
    """Logprobs on the wire, each token with its text."""
    return [
        generation_pb2.TokenLogprob(
            token_id=value.token_id,
            logprob=value.logprob,
            text=text(value.token_id),
            top=[
                generation_pb2.TopLogprob(token_id=top.token_id, logprob=top.logprob, text=text(top.token_id))
                for top in value.top
            ],
        )
        for value in values
    ]


def resolved(adapters: Iterable[ResolvedAdapter]) -> list[generation_pb2.AdapterRef]:
    """The adapters of a request with their content digests."""
    return [
        generation_pb2.AdapterRef(name=item.name, weight=item.weight, uid=item.uid, not_invoked=not item.invoked)
        for item in adapters
    ]


def model(info: ModelInfo) -> model_pb2.Model:
    """The model on the wire."""
    return model_pb2.Model(
        id=info.model_id,
        architecture=info.architecture,
        dtype=info.dtype,
        device=info.device,
        quantization=info.quantization,
        tensor_parallel_size=info.tensor_parallel_size,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        eos_token_ids=info.eos_token_ids,
        sites=info.sites,
        backends=info.backends,
        limits=model_pb2.Limits(
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            kv_page_size=info.kv_page_size,
            kv_num_pages=info.kv_num_pages,
            adapter_memory_bytes=info.adapter_memory_bytes,
            max_prompt_bytes=MAX_PROMPT_BYTES,
            max_stop_strings=MAX_STOP_STRINGS,
            max_logprobs=MAX_LOGPROBS,
            max_adapters_per_request=MAX_ADAPTERS_PER_REQUEST,
            state_num_slots=info.state_num_slots,
            state_slot_bytes=info.state_slot_bytes,
        ),
        server_version=__version__,
        weight_bytes=info.weight_bytes,
    )


def _prompt(pb: generation_pb2.GenerateRequest, info: ModelInfo) -> Prompt:
    match pb.WhichOneof("prompt"):
        case "text":
            return Prompt(text=_text(pb.text))
        case "token_ids":
            return Prompt(token_ids=_token_ids(pb.token_ids, info))
        case "chat":
            return Prompt(chat=_chat(pb.chat))
        case _:
            raise limits.refusal("prompt", "is not set; send one of text, token_ids, chat")


def _text(text: str) -> str:
    if not text:
        limits.refuse("text", "is empty; it must have at least one character")
    return text


def _token_ids(pb: generation_pb2.TokenIds, info: ModelInfo) -> tuple[int, ...]:
    num = len(pb.ids)
    if num == 0:
        limits.refuse("token_ids.ids", "is empty; it must have at least one token id")
    if num >= info.max_model_len:
        limits.refuse("token_ids.ids", f"has {num} tokens; at most {info.max_model_len - 1} are allowed by this model")
    ids = tuple(pb.ids)
    limits.token_id("token_ids.ids", max(ids), info.vocab_size)
    return ids


def _chat(pb: generation_pb2.Chat) -> ChatMessages:
    if not pb.messages:
        limits.refuse("chat.messages", "is empty; it must have at least one message")
    limits.count("chat.messages", len(pb.messages), MAX_CHAT_MESSAGES)
    messages = tuple((message.role, message.content) for message in pb.messages)
    for role, _ in messages:
        if not role or len(role.encode()) > MAX_ROLE_BYTES:
            limits.refuse(
                "chat.messages.role", f"{limits.shown(role)} is not a role; allowed are 1 to {MAX_ROLE_BYTES} bytes"
            )
    return messages


def _sampling(pb: generation_pb2.SamplingParams, info: ModelInfo) -> SamplingParams:
    temperature = limits.number("sampling.temperature", pb.temperature, 0.0, MAX_TEMPERATURE)
    if 0.0 < temperature < MIN_TEMPERATURE:
        limits.refuse("sampling.temperature", f"{temperature:g} is too small; use 0 (greedy) or at least 0.001")
    return SamplingParams(
        temperature=temperature,
        top_p=limits.number("sampling.top_p", pb.top_p, 0.0, 1.0) or 1.0,
        top_k=min(pb.top_k, info.vocab_size),
        min_p=limits.number("sampling.min_p", pb.min_p, 0.0, 1.0),
        repetition_penalty=limits.number(
            "sampling.repetition_penalty", pb.repetition_penalty, 0.0, MAX_REPETITION_PENALTY
        )
        or 1.0,
        presence_penalty=limits.number("sampling.presence_penalty", pb.presence_penalty, -MAX_PENALTY, MAX_PENALTY),
        frequency_penalty=limits.number("sampling.frequency_penalty", pb.frequency_penalty, -MAX_PENALTY, MAX_PENALTY),
        seed=pb.seed if pb.HasField("seed") else None,
    )


def _stop(pb: generation_pb2.StopRule, info: ModelInfo, default_max_tokens: int) -> StopRule:
    limits.count("stop.stop", len(pb.stop), MAX_STOP_STRINGS)
    limits.count("stop.stop_token_ids", len(pb.stop_token_ids), MAX_STOP_TOKEN_IDS)
    for text in pb.stop:
        num_bytes = len(text.encode())
        if not 1 <= num_bytes <= MAX_STOP_STRING_BYTES:
            limits.refuse("stop.stop", f"a string of {num_bytes} bytes; allowed are 1 to {MAX_STOP_STRING_BYTES} bytes")
    for token_id in pb.stop_token_ids:
        limits.token_id("stop.stop_token_ids", token_id, info.vocab_size)
    max_tokens = pb.max_tokens or default_max_tokens
    if pb.min_tokens > max_tokens:
        limits.refuse("stop.min_tokens", f"{pb.min_tokens} is more than max_tokens, which is {max_tokens}")
    return StopRule(max_tokens, pb.min_tokens, tuple(pb.stop), tuple(pb.stop_token_ids), pb.ignore_eos)
