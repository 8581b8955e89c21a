"""What a server answers, as frozen values, read from its protobuf messages. Pure: no channel, no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from loraplex_proto.v1 import adapters_pb2, generation_pb2, model_pb2


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and seconds of one request."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    queue_s: float
    ttft_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """A candidate token."""

    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its natural-log probability, and the best candidates at its position."""

    token_id: int
    logprob: float
    text: str
    top: tuple[TopLogprob, ...]


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """An adapter as a request used it: which content, at what weight.

    ``invoked`` is False where the prompt does not hold the adapter's invocation tokens (an aLoRA;
    ``Adapter.invocation_tokens``), so that it changed nothing and the base model answered.
    """

    name: str
    uid: str
    weight: float
    invoked: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer. ``finish_reason`` and ``usage`` come with the last, ``adapters`` with the first."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str
    usage: Usage | None
    prompt_logprobs: tuple[TokenLogprob, ...]
    adapters: tuple[AdapterUse, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer. ``finish_reason`` is "stop", "length" or "cancelled"."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str
    usage: Usage
    prompt_logprobs: tuple[TokenLogprob, ...]
    adapters: tuple[AdapterUse, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """What an adapter does to the logits of a short prompt of ``num_tokens`` tokens.

    ``max_change``: the largest absolute difference of a logit; ``top_changed``: the share of positions whose best next
    token is another one.
    """

    max_change: float
    top_changed: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """The tokenizer of an adapter's requests: its ``own``, or the base model's.

    ``vocab_size``: tokens that they may use. ``chat_template``: it ships one, and the server allows it.
    ``chat_template_not_allowed``: it ships one, and chats are rendered with the base model's all the same.
    """

    own: bool
    vocab_size: int
    chat_template: bool
    chat_template_not_allowed: bool


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn: the fields of ``Params`` of these names."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float


@dataclass(frozen=True, slots=True)
class GenerationProfile:
    """Defaults that an adapter ships; None: those of the server, or of the base model."""

    sampling: Sampling | None
    stop_token_ids: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on the server. ``sites``, ``ranks`` and ``changes`` are per module name; times are None for never.

    ``state``: "loading", "ready", "draining", "failed" (``error`` says why) or "unloaded". ``residency``: "device",
    "host" or "disk". ``uid``: the digest of its content, equal under two names. ``bytes``: what it takes of the adapter
    memory when it is there alone; saved modules of equal content are shared. ``max_rank``: 0 where nothing of low rank
    is changed. ``invocation_tokens``: an aLoRA is on from the last place where the prompt holds them; empty: always on;
    ``invocation_text``: the same as text.
    ``profile``: the defaults that it ships; None: none.
    ``tokenizer`` is None until the adapter has been read, ``probe`` until it has been tried.
    """

    name: str
    uid: str
    kind: str
    state: str
    source: str
    max_rank: int
    num_parameters: int
    bytes: int
    sites: Mapping[str, int]
    ranks: Mapping[str, int]
    residency: str
    pinned: bool
    in_flight: int
    loaded_at: datetime | None
    last_used_at: datetime | None
    error: str
    generation: int
    changes: Mapping[str, str]
    probe: Probe | None
    invocation_tokens: tuple[int, ...]
    invocation_text: str
    tokenizer: TokenizerInfo | None
    profile: GenerationProfile | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server holds requests to."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_page_size: int
    kv_num_pages: int
    adapter_memory_bytes: int
    max_prompt_bytes: int
    max_stop_strings: int
    max_logprobs: int
    max_adapters_per_request: int
    #: of a model with state-space layers, else 0
    state_num_slots: int
    state_slot_bytes: int


@dataclass(frozen=True, slots=True)
class Model:
    """The base model and how it is served."""

    id: str
    architecture: str
    dtype: str
    device: str
    quantization: str
    tensor_parallel_size: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    sites: tuple[str, ...]
    backends: Mapping[str, str]
    limits: Limits
    server_version: str
    weight_bytes: int


def chunk(pb: generation_pb2.GenerateChunk) -> Chunk:
    """Read a GenerateChunk."""
    return Chunk(
        request_id=pb.request_id,
        text=pb.text,
        token_ids=tuple(pb.token_ids),
        logprobs=_logprobs(pb.logprobs),
        finish_reason=_finish_reason(pb.finish_reason),
        usage=_usage(pb.usage) if pb.HasField("usage") else None,
        prompt_logprobs=_logprobs(pb.prompt_logprobs),
        adapters=_adapter_uses(pb.adapters),
    )


def result(pb: generation_pb2.GenerateResponse) -> Result:
    """Read a GenerateResponse."""
    return Result(
        request_id=pb.request_id,
        text=pb.text,
        token_ids=tuple(pb.token_ids),
        logprobs=_logprobs(pb.logprobs),
        finish_reason=_finish_reason(pb.finish_reason),
        usage=_usage(pb.usage),
        prompt_logprobs=_logprobs(pb.prompt_logprobs),
        adapters=_adapter_uses(pb.adapters),
    )


def adapter(pb: adapters_pb2.Adapter) -> Adapter:
    """Read an Adapter."""
    return Adapter(
        name=pb.name,
        uid=pb.uid,
        kind=pb.kind,
        state=adapters_pb2.AdapterState.Name(pb.state).lower(),
        source=pb.source,
        max_rank=pb.max_rank,
        num_parameters=pb.num_parameters,
        bytes=pb.bytes,
        sites=dict(sorted(pb.coverage.sites.items())),
        ranks=dict(sorted(pb.coverage.ranks.items())),
        residency=adapters_pb2.Residency.Name(pb.residency).lower(),
        pinned=pb.pinned,
        in_flight=pb.in_flight,
        loaded_at=_time(pb.loaded_at) if pb.HasField("loaded_at") else None,
        last_used_at=_time(pb.last_used_at) if pb.HasField("last_used_at") else None,
        error=pb.error,
        generation=pb.generation,
        changes=dict(sorted(pb.coverage.changes.items())),
        probe=_probe(pb.probe) if pb.HasField("probe") else None,
        invocation_tokens=tuple(pb.invocation_tokens),
        invocation_text=pb.invocation_text,
        tokenizer=_tokenizer(pb.tokenizer) if pb.HasField("tokenizer") else None,
        profile=_profile(pb.profile) if pb.HasField("profile") else None,
    )


def model(pb: model_pb2.Model) -> Model:
    """Read a Model."""
    return Model(
        id=pb.id,
        architecture=pb.architecture,
        dtype=pb.dtype,
        device=pb.device,
        quantization=pb.quantization,
        tensor_parallel_size=pb.tensor_parallel_size,
        vocab_size=pb.vocab_size,
        max_model_len=pb.max_model_len,
        eos_token_ids=tuple(pb.eos_token_ids),
        sites=tuple(pb.sites),
        backends=dict(pb.backends),
        limits=Limits(
            max_num_seqs=pb.limits.max_num_seqs,
            max_num_batched_tokens=pb.limits.max_num_batched_tokens,
            kv_page_size=pb.limits.kv_page_size,
            kv_num_pages=pb.limits.kv_num_pages,
            adapter_memory_bytes=pb.limits.adapter_memory_bytes,
            max_prompt_bytes=pb.limits.max_prompt_bytes,
            max_stop_strings=pb.limits.max_stop_strings,
            max_logprobs=pb.limits.max_logprobs,
            max_adapters_per_request=pb.limits.max_adapters_per_request,
            state_num_slots=pb.limits.state_num_slots,
            state_slot_bytes=pb.limits.state_slot_bytes,
        ),
        server_version=pb.server_version,
        weight_bytes=pb.weight_bytes,
    )


def _finish_reason(value: generation_pb2.FinishReason) -> str:
    """Lower case; empty while the answer goes on."""
    return generation_pb2.FinishReason.Name(value).lower() if value else ""


def _usage(pb: generation_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=pb.prompt_tokens,
        cached_prompt_tokens=pb.cached_prompt_tokens,
        completion_tokens=pb.completion_tokens,
        queue_s=pb.queue_s,
        ttft_s=pb.ttft_s,
        total_s=pb.total_s,
    )


def _logprobs(values: Iterable[generation_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            value.token_id,
            value.logprob,
            value.text,
            tuple(TopLogprob(top.token_id, top.logprob, top.text) for top in value.top),
        )
        for value in values
    )


def _adapter_uses(refs: Iterable[generation_pb2.AdapterRef]) -> tuple[AdapterUse, ...]:
    return tuple(AdapterUse(ref.name, ref.uid, ref.weight, not ref.not_invoked) for ref in refs)


def _probe(pb: adapters_pb2.Probe) -> Probe:
    return Probe(pb.max_change, pb.top_changed, pb.num_tokens)


def _tokenizer(pb: adapters_pb2.TokenizerInfo) -> TokenizerInfo:
    return TokenizerInfo(pb.own, pb.vocab_size, pb.chat_template, pb.chat_template_not_allowed)


def _profile(pb: adapters_pb2.GenerationProfile) -> GenerationProfile:
    return GenerationProfile(
        sampling=_sampling(pb.sampling) if pb.HasField("sampling") else None,
        stop_token_ids=tuple(pb.stop.stop_token_ids) if pb.HasField("stop") else None,
    )


def _sampling(pb: generation_pb2.SamplingParams) -> Sampling:
    return Sampling(
        pb.temperature,
        pb.top_p,
        pb.top_k,
        pb.min_p,
        pb.repetition_penalty,
        pb.presence_penalty,
        pb.frequency_penalty,
    )


def _time(value: Timestamp) -> datetime:
    return value.ToDatetime(tzinfo=UTC)
