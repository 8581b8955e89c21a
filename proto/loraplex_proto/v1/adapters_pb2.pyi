import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from loraplex_proto.v1 import generation_pb2 as _generation_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AdapterState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_STATE_UNSPECIFIED: _ClassVar[AdapterState]
    LOADING: _ClassVar[AdapterState]
    READY: _ClassVar[AdapterState]
    DRAINING: _ClassVar[AdapterState]
    FAILED: _ClassVar[AdapterState]
    UNLOADED: _ClassVar[AdapterState]

class Residency(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESIDENCY_UNSPECIFIED: _ClassVar[Residency]
    DEVICE: _ClassVar[Residency]
    HOST: _ClassVar[Residency]
    DISK: _ClassVar[Residency]

class OnConflict(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_CONFLICT_UNSPECIFIED: _ClassVar[OnConflict]
    FAIL: _ClassVar[OnConflict]
    REPLACE: _ClassVar[OnConflict]

class UnloadMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNLOAD_MODE_UNSPECIFIED: _ClassVar[UnloadMode]
    DRAIN: _ClassVar[UnloadMode]
    ABORT: _ClassVar[UnloadMode]

class ResidentMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESIDENT_MODE_UNSPECIFIED: _ClassVar[ResidentMode]
    AUTO: _ClassVar[ResidentMode]
    MERGED: _ClassVar[ResidentMode]
ADAPTER_STATE_UNSPECIFIED: AdapterState
LOADING: AdapterState
READY: AdapterState
DRAINING: AdapterState
FAILED: AdapterState
UNLOADED: AdapterState
RESIDENCY_UNSPECIFIED: Residency
DEVICE: Residency
HOST: Residency
DISK: Residency
ON_CONFLICT_UNSPECIFIED: OnConflict
FAIL: OnConflict
REPLACE: OnConflict
UNLOAD_MODE_UNSPECIFIED: UnloadMode
DRAIN: UnloadMode
ABORT: UnloadMode
RESIDENT_MODE_UNSPECIFIED: ResidentMode
AUTO: ResidentMode
MERGED: ResidentMode

class Coverage(_message.Message):
    __slots__ = ("sites", "ranks", "changes")
    class SitesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class RanksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class ChangesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SITES_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    sites: _containers.ScalarMap[str, int]
    ranks: _containers.ScalarMap[str, int]
    changes: _containers.ScalarMap[str, str]
    def __init__(self, sites: _Optional[_Mapping[str, int]] = ..., ranks: _Optional[_Mapping[str, int]] = ..., changes: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("max_change", "top_changed", "num_tokens")
    MAX_CHANGE_FIELD_NUMBER: _ClassVar[int]
    TOP_CHANGED_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_change: float
    top_changed: float
    num_tokens: int
    def __init__(self, max_change: _Optional[float] = ..., top_changed: _Optional[float] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class TokenizerInfo(_message.Message):
    __slots__ = ("own", "vocab_size", "chat_template", "chat_template_not_allowed")
    OWN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_NOT_ALLOWED_FIELD_NUMBER: _ClassVar[int]
    own: bool
    vocab_size: int
    chat_template: bool
    chat_template_not_allowed: bool
    def __init__(self, own: bool = ..., vocab_size: _Optional[int] = ..., chat_template: bool = ..., chat_template_not_allowed: bool = ...) -> None: ...

class GenerationProfile(_message.Message):
    __slots__ = ("sampling", "stop")
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    sampling: _generation_pb2.SamplingParams
    stop: _generation_pb2.StopRule
    def __init__(self, sampling: _Optional[_Union[_generation_pb2.SamplingParams, _Mapping]] = ..., stop: _Optional[_Union[_generation_pb2.StopRule, _Mapping]] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "uid", "kind", "state", "source", "max_rank", "num_parameters", "bytes", "coverage", "residency", "pinned", "in_flight", "loaded_at", "last_used_at", "error", "aliases", "generation", "tokenizer", "profile", "probe", "invocation_tokens", "invocation_text")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    RESIDENCY_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    LOADED_AT_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_AT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    INVOCATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    INVOCATION_TEXT_FIELD_NUMBER: _ClassVar[int]
    name: str
    uid: str
    kind: str
    state: AdapterState
    source: str
    max_rank: int
    num_parameters: int
    bytes: int
    coverage: Coverage
    residency: Residency
    pinned: bool
    in_flight: int
    loaded_at: _timestamp_pb2.Timestamp
    last_used_at: _timestamp_pb2.Timestamp
    error: str
    aliases: _containers.RepeatedScalarFieldContainer[str]
    generation: int
    tokenizer: TokenizerInfo
    profile: GenerationProfile
    probe: Probe
    invocation_tokens: _containers.RepeatedScalarFieldContainer[int]
    invocation_text: str
    def __init__(self, name: _Optional[str] = ..., uid: _Optional[str] = ..., kind: _Optional[str] = ..., state: _Optional[_Union[AdapterState, str]] = ..., source: _Optional[str] = ..., max_rank: _Optional[int] = ..., num_parameters: _Optional[int] = ..., bytes: _Optional[int] = ..., coverage: _Optional[_Union[Coverage, _Mapping]] = ..., residency: _Optional[_Union[Residency, str]] = ..., pinned: bool = ..., in_flight: _Optional[int] = ..., loaded_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., last_used_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., error: _Optional[str] = ..., aliases: _Optional[_Iterable[str]] = ..., generation: _Optional[int] = ..., tokenizer: _Optional[_Union[TokenizerInfo, _Mapping]] = ..., profile: _Optional[_Union[GenerationProfile, _Mapping]] = ..., probe: _Optional[_Union[Probe, _Mapping]] = ..., invocation_tokens: _Optional[_Iterable[int]] = ..., invocation_text: _Optional[str] = ...) -> None: ...

class LoadAdapterRequest(_message.Message):
    __slots__ = ("name", "source", "pinned", "on_conflict")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    ON_CONFLICT_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    pinned: bool
    on_conflict: OnConflict
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., pinned: bool = ..., on_conflict: _Optional[_Union[OnConflict, str]] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name", "mode")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    name: str
    mode: UnloadMode
    def __init__(self, name: _Optional[str] = ..., mode: _Optional[_Union[UnloadMode, str]] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UpdateAdapterRequest(_message.Message):
    __slots__ = ("name", "pinned", "resident_mode")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_MODE_FIELD_NUMBER: _ClassVar[int]
    name: str
    pinned: bool
    resident_mode: ResidentMode
    def __init__(self, name: _Optional[str] = ..., pinned: bool = ..., resident_mode: _Optional[_Union[ResidentMode, str]] = ...) -> None: ...

class WatchAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AdapterEvent(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class MergeAdaptersRequest(_message.Message):
    __slots__ = ("name", "inputs", "method", "density", "majority_sign_method", "svd_rank", "seed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    MAJORITY_SIGN_METHOD_FIELD_NUMBER: _ClassVar[int]
    SVD_RANK_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    name: str
    inputs: _containers.RepeatedCompositeFieldContainer[_generation_pb2.AdapterRef]
    method: str
    density: float
    majority_sign_method: str
    svd_rank: int
    seed: int
    def __init__(self, name: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[_generation_pb2.AdapterRef, _Mapping]]] = ..., method: _Optional[str] = ..., density: _Optional[float] = ..., majority_sign_method: _Optional[str] = ..., svd_rank: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class ExportAdapterRequest(_message.Message):
    __slots__ = ("name", "destination", "format")
    class Format(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        FORMAT_UNSPECIFIED: _ClassVar[ExportAdapterRequest.Format]
        PEFT: _ClassVar[ExportAdapterRequest.Format]
        MERGED: _ClassVar[ExportAdapterRequest.Format]
    FORMAT_UNSPECIFIED: ExportAdapterRequest.Format
    PEFT: ExportAdapterRequest.Format
    MERGED: ExportAdapterRequest.Format
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    name: str
    destination: str
    format: ExportAdapterRequest.Format
    def __init__(self, name: _Optional[str] = ..., destination: _Optional[str] = ..., format: _Optional[_Union[ExportAdapterRequest.Format, str]] = ...) -> None: ...

class ExportProgress(_message.Message):
    __slots__ = ("stage", "done_bytes", "total_bytes", "destination")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    stage: str
    done_bytes: int
    total_bytes: int
    destination: str
    def __init__(self, stage: _Optional[str] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., destination: _Optional[str] = ...) -> None: ...
