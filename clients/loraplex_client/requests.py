"""What a caller asks, as plain values, and the protobuf requests they become. Pure: no channel, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

from loraplex_proto.v1 import adapters_pb2, generation_pb2


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


#: text, token ids, or a chat. Text and chats are tokenized by the adapter's tokenizer where it ships one, and chats
#: rendered with its template where the server allows that; else by the base model's
Prompt = str | Sequence[int] | Sequence[Message]
#: one name, several names (each with weight 1), or names with their weights; "" is the base model. Several are
#: served as their weighted sum; the server refuses sums that are not defined (two DoRAs, two saved heads)
Adapters = str | Sequence[str] | Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Params:
    """How to generate. The defaults are greedy decoding to the server's default length.

    Example::

        Params(max_tokens=64, temperature=0.7, top_p=0.9, seed=1, stop=("\\n\\n",))
    """

    max_tokens: int = 0  #: 0 means the server's default; cut to the room the model has
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    temperature: float = 0.0  #: 0 is greedy
    top_p: float = 0.0  #: 0 and 1 mean off
    top_k: int = 0  #: 0 means off
    min_p: float = 0.0
    repetition_penalty: float = 0.0  #: 0 and 1 mean off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  #: the same seed gives the same tokens whatever else the server does
    #: send none of the fields from ``temperature`` to ``seed``: the adapter's own defaults (``Adapter.profile``) hold
    #: where it ships some, else greedy decoding
    adapter_sampling: bool = False
    logprobs: int = 0  #: candidates reported at each position; 0 means no logprobs
    prompt_logprobs: bool = False
    token_ids: bool = False
    include_stop: bool = False
    priority: int = 0  #: higher runs first
    request_id: str = ""  #: chosen by the server when empty


#: greedy, to the server's default length
GREEDY: Final = Params()


def generate_request(prompt: Prompt, params: Params, adapters: Adapters) -> generation_pb2.GenerateRequest:
    """The request that ``generate`` and ``stream`` send."""
    request = generation_pb2.GenerateRequest(
        request_id=params.request_id,
        adapters=_adapter_refs(adapters),
        sampling=None if params.adapter_sampling else _sampling(params),
        stop=generation_pb2.StopRule(
            max_tokens=params.max_tokens,
            min_tokens=params.min_tokens,
            stop=params.stop,
            stop_token_ids=params.stop_token_ids,
            ignore_eos=params.ignore_eos,
        ),
        output=generation_pb2.OutputOptions(
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
            token_ids=params.token_ids,
            include_stop=params.include_stop,
        ),
        priority=params.priority,
    )
    if isinstance(prompt, str):
        request.text = prompt
        return request
    if prompt and isinstance(prompt[0], Message):
        request.chat.CopyFrom(_chat(cast(Sequence[Message], prompt)))
    else:
        request.token_ids.SetInParent()
        request.token_ids.ids.extend(cast(Sequence[int], prompt))
    return request


def tokenize_request(prompt: str | Sequence[Message], adapters: Adapters) -> generation_pb2.TokenizeRequest:
    """The request that ``tokenize`` sends."""
    refs = _adapter_refs(adapters)
    if isinstance(prompt, str):
        return generation_pb2.TokenizeRequest(text=prompt, adapters=refs)
    return generation_pb2.TokenizeRequest(chat=_chat(prompt), adapters=refs)


def load_request(name: str, source: str, pinned: bool, replace: bool) -> adapters_pb2.LoadAdapterRequest:
    """The request that ``load_adapter`` sends."""
    on_conflict = adapters_pb2.REPLACE if replace else adapters_pb2.FAIL
    return adapters_pb2.LoadAdapterRequest(name=name, source=source, pinned=pinned, on_conflict=on_conflict)


def unload_request(name: str, abort: bool) -> adapters_pb2.UnloadAdapterRequest:
    """The request that ``unload_adapter`` sends."""
    return adapters_pb2.UnloadAdapterRequest(name=name, mode=adapters_pb2.ABORT if abort else adapters_pb2.DRAIN)


def pin_request(name: str, pinned: bool) -> adapters_pb2.UpdateAdapterRequest:
    """The request that ``pin_adapter`` sends."""
    return adapters_pb2.UpdateAdapterRequest(name=name, pinned=pinned)


def _sampling(params: Params) -> generation_pb2.SamplingParams:
    return generation_pb2.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
    )


def _chat(messages: Sequence[Message]) -> generation_pb2.Chat:
    return generation_pb2.Chat(messages=[generation_pb2.Message(role=m.role, content=m.content) for m in messages])


def _adapter_refs(adapters: Adapters) -> list[generation_pb2.AdapterRef]:
    if isinstance(adapters, str):
        return [generation_pb2.AdapterRef(name=adapters)] if adapters else []
    if isinstance(adapters, Mapping):
        return [generation_pb2.AdapterRef(name=name, weight=weight) for name, weight in adapters.items()]
    return [generation_pb2.AdapterRef(name=name) for name in adapters]
