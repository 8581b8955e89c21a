"""Protobuf to our types and back, for the life of adapters. Every request field is checked here.

Calls no engine and knows no status codes. All checks raise InvalidRequest, what is not built yet UnsupportedFeature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from loraplex.rpc import convert, limits
from loraplex.types import (
    EXPORT_QUANTIZATIONS,
    MAX_MERGE_BYTES,
    MAX_MERGE_INPUTS,
    MERGE_PREFIX,
    AdapterInfo,
    AdapterRef,
    AdapterState,
    ExportFormat,
    ExportProgress,
    MergeOptions,
    MergeReport,
    ModelInfo,
    OnConflict,
    OwnText,
    Residency,
    ResidentMode,
    RouterInfo,
    UnloadMode,
)
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
_RESIDENT_MODE: Final[dict[int, ResidentMode | None]] = {
    adapters_pb2.RESIDENT_MODE_UNSPECIFIED: None,
    adapters_pb2.AUTO: ResidentMode.AUTO,
    adapters_pb2.MERGED: ResidentMode.MERGED,
}
_UNLOAD_MODE: Final[dict[int, UnloadMode]] = {
    adapters_pb2.UNLOAD_MODE_UNSPECIFIED: UnloadMode.DRAIN,
    adapters_pb2.DRAIN: UnloadMode.DRAIN,
    adapters_pb2.ABORT: UnloadMode.ABORT,
}
_FORMAT: Final[dict[int, ExportFormat]] = {
    adapters_pb2.ExportAdapterRequest.PEFT: ExportFormat.PEFT,
    adapters_pb2.ExportAdapterRequest.MERGED: ExportFormat.MERGED,
}


def load_adapter(pb: adapters_pb2.LoadAdapterRequest) -> tuple[str, str, bool, OnConflict]:
    """(name, source, pinned, on_conflict) of a LoadAdapterRequest."""
    name = limits.name("name", pb.name)
    most = MAX_MERGE_BYTES if pb.source.startswith(MERGE_PREFIX) else MAX_SOURCE_BYTES
    if not pb.source or len(pb.source.encode()) > most or "\x00" in pb.source:
        limits.refuse("source", f"{limits.shown(pb.source)} is not a source; allowed are 1 to {most} bytes")
    return name, pb.source, pb.pinned, _on_conflict(pb.on_conflict)


@dataclass(frozen=True, slots=True)
class Merge:
    """A MergeAdaptersRequest. Its options' ranges, which LoadAdapter can be given too, are checked with its recipe."""

    name: str
    inputs: tuple[AdapterRef, ...]
    options: MergeOptions
    pinned: bool
    on_conflict: OnConflict


def merge_adapters(pb: adapters_pb2.MergeAdaptersRequest) -> Merge:
    """What a MergeAdaptersRequest asks for."""
    name = limits.name("name", pb.name)
    if not pb.inputs:
        limits.refuse("inputs", "is empty; a merge takes one adapter or more")
    options = MergeOptions(
        pb.method,
        density=pb.density,
        majority_sign_method=pb.majority_sign_method or MergeOptions(pb.method).majority_sign_method,
        svd_rank=pb.svd_rank,
        svd_clamp=pb.svd_clamp,
        max_error=pb.max_error,
        seed=pb.seed,
    )
    inputs = convert.weighted("inputs", pb.inputs, MAX_MERGE_INPUTS)
    return Merge(name, inputs, options, pb.pinned, _on_conflict(pb.on_conflict))


@dataclass(frozen=True, slots=True)
class Export:
    """An ExportAdapterRequest. Where its destination may lie is the engine's to say."""

    name: str
    destination: str
    format: ExportFormat
    max_shard_bytes: int
    quantization: str


def export_adapter(pb: adapters_pb2.ExportAdapterRequest) -> Export:
    """What an ExportAdapterRequest asks for."""
    name = limits.name("name", pb.name)
    if not pb.destination or len(pb.destination.encode()) > MAX_SOURCE_BYTES or "\x00" in pb.destination:
        limits.refuse(
            "destination", f"{limits.shown(pb.destination)} is no directory; allowed are 1 to {MAX_SOURCE_BYTES} bytes"
        )
    if pb.format not in _FORMAT:
        limits.refuse("format", f"{pb.format or 'none'} is unknown; allowed are PEFT, MERGED")
    if pb.max_shard_bytes and pb.format != adapters_pb2.ExportAdapterRequest.MERGED:
        limits.refuse("max_shard_bytes", f"{pb.max_shard_bytes} has no use in format PEFT, which is one file")
    if pb.quantization and pb.quantization not in EXPORT_QUANTIZATIONS:
        allowed = ", ".join(EXPORT_QUANTIZATIONS)
        limits.refuse("quantization", f"{limits.shown(pb.quantization)} is unknown; allowed are {allowed}, or nothing")
    if pb.quantization and pb.format != adapters_pb2.ExportAdapterRequest.MERGED:
        limits.refuse("quantization", f"{pb.quantization} has no use in format PEFT, which holds no matrix of the base")
    return Export(name, pb.destination, _FORMAT[pb.format], pb.max_shard_bytes, pb.quantization)


def export_progress(progress: ExportProgress) -> adapters_pb2.ExportProgress:
    """How far an export has come, on the wire."""
    return adapters_pb2.ExportProgress(
        stage=progress.stage,
        done_bytes=progress.done_bytes,
        total_bytes=progress.total_bytes,
        destination=progress.destination,
        largest_error=progress.largest_error,
        largest_error_site=progress.largest_error_site,
        mean_error=progress.mean_error,
    )


def unload_adapter(pb: adapters_pb2.UnloadAdapterRequest) -> tuple[str, UnloadMode]:
    """(name, mode) of an UnloadAdapterRequest."""
    if pb.mode not in _UNLOAD_MODE:
        limits.refuse("mode", f"{pb.mode} is unknown; allowed are DRAIN, ABORT")
    return limits.name("name", pb.name), _UNLOAD_MODE[pb.mode]


def update_adapter(pb: adapters_pb2.UpdateAdapterRequest) -> tuple[str, bool | None, ResidentMode | None]:
    """(name, pinned, resident mode) of an UpdateAdapterRequest; None: left as it is."""
    name = limits.name("name", pb.name)
    if pb.resident_mode not in _RESIDENT_MODE:
        limits.refuse("resident_mode", f"{pb.resident_mode} is unknown; allowed are AUTO, MERGED")
    mode, pinned = _RESIDENT_MODE[pb.resident_mode], pb.pinned if pb.HasField("pinned") else None
    if mode is None and pinned is None:
        limits.refuse("pinned", "is not set, nor is resident_mode; an update without either changes nothing")
    return name, pinned, mode


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
        resident_mode=adapters_pb2.MERGED if info.resident_mode is ResidentMode.MERGED else adapters_pb2.AUTO,
        merged_bytes=info.merged_bytes,
        invocation_tokens=info.invocation_tokens,
        invocation_text=info.invocation_text,
    )
    if info.merge is not None:
        message.merge.CopyFrom(_merge(info.merge))
    if info.router is not None:
        message.router.CopyFrom(_router(info.router))
    if info.uid:
        message.tokenizer.CopyFrom(_tokenizer(info, model))
    if info.probe is not None:
        message.probe.max_change = info.probe.max_change
        message.probe.top_changed = info.probe.top_changed
        message.probe.num_tokens = info.probe.num_tokens
    if info.text is not None:
        _fill_profile(message, info.text)
    return message


def _on_conflict(value: int) -> OnConflict:
    if value not in _ON_CONFLICT:
        limits.refuse("on_conflict", f"{value} is unknown; allowed are FAIL, REPLACE")
    return _ON_CONFLICT[value]


def _merge(report: MergeReport) -> adapters_pb2.Merge:
    options = report.recipe.options
    return adapters_pb2.Merge(
        inputs=[adapters_pb2.MergeInput(name=i.name, uid=i.uid, weight=i.weight) for i in report.recipe.inputs],
        method=options.method,
        density=options.density,
        majority_sign_method=options.majority_sign_method,
        svd_rank=options.svd_rank,
        svd_clamp=options.svd_clamp,
        max_error=options.max_error,
        seed=options.seed,
        largest_error=report.largest_error,
        mean_error=report.mean_error,
    )


def _router(info: RouterInfo) -> adapters_pb2.Router:
    return adapters_pb2.Router(
        feature=info.feature,
        adapters=info.adapters,
        num_prototypes=info.num_prototypes,
        temperature=info.temperature,
        threshold=info.threshold,
        default_adapter=info.default,
    )


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
