"""Protobuf to our types and back, for the life of adapters. Every request field is checked here.

Calls no engine and knows no status codes. All checks raise InvalidRequest, what is not built yet UnsupportedFeature.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from loraplex.errors import UnsupportedFeature
from loraplex.rpc import limits
from loraplex.types import AdapterInfo, AdapterState, ModelInfo, OnConflict, OwnText, Residency, UnloadMode
from loraplex_proto.v1 import adapters_pb2, generation_pb2

MAX_SOURCE_BYTES: Final = 4096

_STATE: Final = {
    AdapterState.LOADING: adapters_pb2.LOADING,
    AdapterState.READY: adapters_pb2.READY,
    AdapterState.DRAINING: adapters_pb2.DRAINING,
    AdapterState.FAILED: adapters_pb2.FAILED,
    AdapterState.UNLOADED: adapters_pb2.UNLOADED,
}
_RESIDENCY: Final = {
    Residency.DEVICE: adapters_pb2.DEVICE,
    Residency.HOST: adapters_pb2.HOST,
    Residency.DISK: adapters_pb2.DISK,
}
_ON_CONFLICT: Final[dict[int, OnConflict]] = {
    adapters_pb2.ON_CONFLICT_UNSPECIFIED: OnConflict.FAIL,
    adapters_pb2.FAIL: OnConflict.FAIL,
    adapters_pb2.REPLACE: OnConflict.REPLACE,
}
_UNLOAD_MODE: Final[dict[int, UnloadMode]] = {
    adapters_pb2.UNLOAD_MODE_UNSPECIFIED: UnloadMode.DRAIN,
    adapters_pb2.DRAIN: UnloadMode.DRAIN,
    adapters_pb2.ABORT: UnloadMode.ABORT,
}


def load_adapter(pb: adapters_pb2.LoadAdapterRequest) -> tuple[str, str, bool, OnConflict]:
    """(name, source, pinned, on_conflict) of a LoadAdapterRequest."""
    name = limits.name("name", pb.name)
    if not pb.source or len(pb.source.encode()) > MAX_SOURCE_BYTES or "\x00" in pb.source:
        limits.refuse("source", f"{limits.shown(pb.source)} is not a source; allowed are 1 to {MAX_SOURCE_BYTES} bytes")
    if pb.on_conflict not in _ON_CONFLICT:
        limits.refuse("on_conflict", f"{pb.on_conflict} is unknown; allowed are FAIL, REPLACE")
    return name, pb.source, pb.pinned, _ON_CONFLICT[pb.on_conflict]


def unload_adapter(pb: adapters_pb2.UnloadAdapterRequest) -> tuple[str, UnloadMode]:
    """(name, mode) of an UnloadAdapterRequest."""
    if pb.mode not in _UNLOAD_MODE:
        limits.refuse("mode", f"{pb.mode} is unknown; allowed are DRAIN, ABORT")
    return limits.name("name", pb.name), _UNLOAD_MODE[pb.mode]


def update_adapter(pb: adapters_pb2.UpdateAdapterRequest) -> tuple[str, bool]:
    """(name, pinned) of an UpdateAdapterRequest.

    Raises:
        UnsupportedFeature: it asks for a resident mode.
    """
    name = limits.name("name", pb.name)
    if pb.resident_mode != adapters_pb2.RESIDENT_MODE_UNSPECIFIED:
        raise UnsupportedFeature(
            f"resident_mode {pb.resident_mode} is not implemented by this server version; leave it out",
            field="resident_mode",
        )
    if not pb.HasField("pinned"):
        limits.refuse("pinned", "is not set; an update without it changes nothing")
    return name, pb.pinned


def adapter_name(pb: adapters_pb2.GetAdapterRequest) -> str:
    """The name of a GetAdapterRequest."""
    return limits.name("name", pb.name)


def adapter(info: AdapterInfo, model: ModelInfo) -> adapters_pb2.Adapter:
    """An adapter of ``model`` on the wire. What is known of its content is there once it has been read."""
    message = adapters_pb2.Adapter(
        name=info.name,
        uid=info.uid,
        kind=info.kind,
        state=_STATE[info.state],
        source=info.source,
        max_rank=info.max_rank,
        num_parameters=info.num_parameters,
        bytes=info.bytes,
        coverage=adapters_pb2.Coverage(
            sites=info.coverage.sites, ranks=info.coverage.ranks, changes=info.coverage.changes
        ),
        residency=_RESIDENCY[info.residency],
        pinned=info.pinned,
        in_flight=info.in_flight,
        loaded_at=_timestamp(info.loaded_at),
        last_used_at=_timestamp(info.last_used_at),
        error=info.error,
        generation=info.generation,
        invocation_tokens=info.invocation_tokens,
        invocation_text=info.invocation_text,
    )
    if info.uid:
        message.tokenizer.CopyFrom(_tokenizer(info, model))
    if info.probe is not None:
        message.probe.max_change = info.probe.max_change
        message.probe.top_changed = info.probe.top_changed
        message.probe.num_tokens = info.probe.num_tokens
    if info.text is not None:
        _fill_profile(message, info.text)
    return message


def _tokenizer(info: AdapterInfo, model: ModelInfo) -> adapters_pb2.TokenizerInfo:
    """What its requests are tokenized with: the base's where it ships nothing."""
    return adapters_pb2.TokenizerInfo(
        own=info.text is not None and info.text.tokenizer,
        vocab_size=info.vocab_size or model.vocab_size,
        chat_template=info.text is not None and info.text.chat_template,
        chat_template_not_allowed=info.template_unused,
    )


def _fill_profile(message: adapters_pb2.Adapter, text: OwnText) -> None:
    """The defaults that an adapter ships; the message stays without a profile where it ships none."""
    if text.sampling is not None:
        own = text.sampling
        message.profile.sampling.CopyFrom(
            generation_pb2.SamplingParams(
                temperature=own.temperature,
                top_p=own.top_p,
                top_k=own.top_k,
                min_p=own.min_p,
                repetition_penalty=own.repetition_penalty,
                presence_penalty=own.presence_penalty,
                frequency_penalty=own.frequency_penalty,
                seed=own.seed,
            )
        )
    if text.eos_token_ids is not None:
        message.profile.stop.SetInParent()
        message.profile.stop.stop_token_ids.extend(text.eos_token_ids)


def _timestamp(unix_s: float) -> Timestamp | None:
    """Unset for 0, which means never."""
    return Timestamp(seconds=int(unix_s), nanos=int(unix_s % 1 * 1e9)) if unix_s else None
