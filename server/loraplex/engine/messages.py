"""What front ends and the engine say to each other: msgspec structs in msgpack over one ZeroMQ socket pair.

A front end names its requests by ``ticket`` and its operations by ``op``, both integers that it alone counts, so two
clients may use one request id. Every Submit is answered by TokenEvents of which exactly one is terminal
(``finish`` or ``failure`` set); every operation by exactly one Reply.
"""

from __future__ import annotations

from typing import Final

import msgspec

from loraplex.config import Config
from loraplex.errors import ERRORS, InternalError, LoraplexError
from loraplex.types import (
    AdapterInfo,
    FinishReason,
    ModelInfo,
    OnConflict,
    Request,
    ResolvedAdapter,
    TokenLogprob,
    UnloadMode,
    Usage,
)


class Failure(msgspec.Struct, frozen=True):
    """A LoraplexError on the wire."""

    error: str
    message: str
    field: str = ""
    retry_after_s: float = 0.0

    @staticmethod
    def of(error: BaseException) -> Failure:
        """The wire form of any exception; foreign ones become InternalError."""
        if isinstance(error, LoraplexError):
            return Failure(type(error).__name__, str(error), error.field, error.retry_after_s)
        return Failure(InternalError.__name__, f"{type(error).__name__}: {error}")

    def to_error(self) -> LoraplexError:
        """The exception this stands for."""
        cls = ERRORS.get(self.error, InternalError)
        return cls(self.message, field=self.field, retry_after_s=self.retry_after_s)


class EngineStart(msgspec.Struct, frozen=True):
    """What a front end tells a new engine process, as one line of JSON on its standard input."""

    config: Config
    model_dir: str
    model_id: str
    address: str  # ipc:// in a directory that only this user may enter
    text_spool: str  # where adapters' own text is kept for front ends, in that directory


# ---- front end -> engine ----


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Begin a generation."""

    ticket: int
    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End these generations (finish CANCELLED); unknown and finished tickets are ignored."""

    tickets: tuple[int, ...]


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Load ``source`` under ``name``; the Reply comes when it can be served."""

    op: int
    name: str
    source: str
    pinned: bool = False
    on_conflict: OnConflict = OnConflict.FAIL


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Unload ``name``; the Reply comes when its last request is over."""

    op: int
    name: str
    mode: UnloadMode = UnloadMode.DRAIN


class PinAdapter(msgspec.Struct, frozen=True, tag=True):
    """Keep ``name`` on the device, or no longer."""

    op: int
    name: str
    pinned: bool


class ListAdapters(msgspec.Struct, frozen=True, tag=True):
    """All adapters, by name."""

    op: int


class GetAdapter(msgspec.Struct, frozen=True, tag=True):
    """One adapter."""

    op: int
    name: str


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A front end introduces itself; answered by Ready."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the engine process now."""


ToEngine = Submit | Abort | LoadAdapter | UnloadAdapter | PinAdapter | ListAdapters | GetAdapter | Hello | Shutdown


# ---- engine -> front end ----


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Progress of the start: bytes of weights read so far."""

    stage: str
    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine serves."""

    model: ModelInfo


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start and ends."""

    failure: Failure


class TokenEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """New tokens of one generation, or its end.

    ``adapters`` comes with the first event; ``prompt_logprobs`` once, before the first token. ``usage`` comes with the
    first token, so that a front end which ends the request at a stop string knows it, and with the end.
    """

    ticket: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    adapters: tuple[ResolvedAdapter, ...] = ()
    finish: FinishReason | None = None
    failure: Failure | None = None
    usage: Usage | None = None

    @property
    def terminal(self) -> bool:
        return self.finish is not None or self.failure is not None


class AdapterGauges(msgspec.Struct, frozen=True, omit_defaults=True):
    """The adapters as they stand; ``evictions`` is a total since start. Names are in no order."""

    evictions: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    #: names of adapters with running / waiting requests
    running: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    states: dict[str, int] = {}
    on_device: tuple[str, ...] = ()
    on_host: tuple[str, ...] = ()


class StepReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step in numbers, and the gauges as they stand after it; ``preemptions`` is a total since start."""

    #: from the step's launch, or from the end of the step before where that came later, until its tokens were told: no
    #: time is counted for two steps
    step_s: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    sequences: int = 0
    #: distinct adapters in the step, base not counted
    adapters: int = 0
    running: int = 0
    waiting: int = 0
    kv_pages_used: int = 0
    kv_pages_cached: int = 0
    kv_pages_free: int = 0
    state_slots_used: int = 0
    state_slots_cached: int = 0
    state_slots_free: int = 0
    preemptions: int = 0
    #: uploads host -> device that ended since the last report, seconds each
    upload_s: tuple[float, ...] = ()
    #: with every heartbeat, and now and then under load: their cost grows with the number of adapters
    gauges: AdapterGauges | None = None


class Outputs(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Everything one step has to say to one front end; ``report`` also comes alone, as the heartbeat."""

    events: tuple[TokenEvent, ...] = ()
    report: StepReport | None = None


class Reply(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """The end of an operation: what it concerned, or why it failed."""

    op: int
    adapters: tuple[AdapterInfo, ...] = ()
    failure: Failure | None = None
    #: seconds the load took, source to servable
    load_s: float = 0.0


class AdapterChanged(msgspec.Struct, frozen=True, tag=True):
    """An adapter entered a state; sent to every front end."""

    adapter: AdapterInfo


ToFrontEnd = Loading | Ready | StartFailed | Outputs | Reply | AdapterChanged

#: exit code of an engine whose group of ranks is no more
RANK_LOST: Final = 3
#: seconds between heartbeats of an idle engine
HEARTBEAT_S: Final = 1.0

encode: Final = msgspec.msgpack.Encoder().encode
decode_to_engine: Final = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_front_end: Final = msgspec.msgpack.Decoder(ToFrontEnd).decode
