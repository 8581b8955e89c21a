"""The nouns of a request's life: what is asked, what comes back. No torch, no protobuf.

All are frozen msgspec structs, so that the same value crosses the process border unchanged.
Token ids are plain ints; times are seconds of ``time.monotonic()`` unless a name says otherwise.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

#: limits that every request is held to before memory is taken for it
MAX_PROMPT_BYTES: Final = 1 << 20
MAX_STOP_STRINGS: Final = 16
MAX_STOP_STRING_BYTES: Final = 256
MAX_STOP_TOKEN_IDS: Final = 64
MAX_LOGPROBS: Final = 20
MAX_ADAPTERS_PER_REQUEST: Final = 8
MAX_CHAT_MESSAGES: Final = 1024
MAX_REQUEST_ID_BYTES: Final = 128
#: field of the Unavailable that refuses a request whose ``text_digest`` is not that of its adapters: made anew, it fits
STALE_TEXT: Final = "text_digest"
#: adapter names and request ids: what may reach labels, logs and paths
NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}"


class FinishReason(enum.StrEnum):
    """Why a sequence ended well."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class AdapterState(enum.StrEnum):
    """Where an adapter is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    UNLOADED = "unloaded"


class Residency(enum.StrEnum):
    """The fastest place an adapter's tensors are in."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class OnConflict(enum.StrEnum):
    """What a load does when the name is in use."""

    FAIL = "fail"
    REPLACE = "replace"


class UnloadMode(enum.StrEnum):
    """What an unload does to running requests: let them finish, or end them."""

    DRAIN = "drain"
    ABORT = "abort"


class AdapterRef(msgspec.Struct, frozen=True):
    """One adapter of a request: its name and its coefficient in the sum."""

    name: str
    weight: float = 1.0


class ResolvedAdapter(msgspec.Struct, frozen=True):
    """An AdapterRef after the name became a content digest."""

    name: str
    uid: str
    weight: float
    #: False: the prompt holds none of its invocation tokens, so that it changed nothing
    invoked: bool = True


class SamplingParams(msgspec.Struct, frozen=True):
    """How the next token is chosen; 0 switches top_p, top_k, min_p and the penalties off.

    ``repetition_penalty`` 1 is neutral and counts prompt and output tokens (transformers' rule);
    presence and frequency penalties count output tokens only.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    @property
    def is_penalized(self) -> bool:
        """Whether a draw depends on the tokens before it."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class StopRule(msgspec.Struct, frozen=True):
    """When a sequence ends. Stop strings are the front end's; the rest is the engine's."""

    max_tokens: int = 128
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


class OutputOptions(msgspec.Struct, frozen=True):
    """What is reported beside the text."""

    logprobs: int = 0
    prompt_logprobs: bool = False
    token_ids: bool = False
    include_stop: bool = False


class Request(msgspec.Struct, frozen=True):
    """One generation, tokenized and checked; the engine may trust every field's range but those of token ids, whose
    bound is the adapters' own. ``text_digest``: of the adapters' own text files that the prompt was made with
    (``OwnText``); empty: the base's.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    adapters: tuple[AdapterRef, ...] = ()
    sampling: SamplingParams = SamplingParams()
    stop: StopRule = StopRule()
    output: OutputOptions = OutputOptions()
    priority: int = 0
    text_digest: str = ""


class TopLogprob(msgspec.Struct, frozen=True):
    """One candidate token and its natural-log probability."""

    token_id: int
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token that was sampled (or stood in the prompt), its logprob, and the best candidates beside it."""

    token_id: int
    logprob: float
    top: tuple[TopLogprob, ...] = ()


class Usage(msgspec.Struct, frozen=True):
    """Counts and durations of one request, in tokens and seconds."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0


class Coverage(msgspec.Struct, frozen=True):
    """What an adapter touches: per module name (q_proj, ...) the number of sites, its largest rank (0 without one), and
    how it changes them (``low rank, out scale``)."""

    sites: dict[str, int]
    ranks: dict[str, int]
    changes: dict[str, str] = {}


class Probe(msgspec.Struct, frozen=True):
    """What an adapter does to the logits of a short prompt: the proof that it does something.

    ``max_change``: the largest absolute difference of a logit, with and without it; ``top_changed``: the share of
    positions whose best token is another one; ``num_tokens``: the prompt's length.
    """

    max_change: float
    top_changed: float
    num_tokens: int


class OwnText(msgspec.Struct, frozen=True):
    """Text files that an adapter ships, by the digest of their content.

    ``tokenizer``: it has tokenizer files; ``chat_template``: and a template. ``max_token_id``: the largest id its
    tokenizer gives. ``eos_token_ids``: of its generation_config.json or tokenizer_config.json; None: the base's.
    ``sampling``: the defaults of its generation_config.json.
    """

    digest: str
    tokenizer: bool = False
    chat_template: bool = False
    max_token_id: int = -1
    eos_token_ids: tuple[int, ...] | None = None
    sampling: SamplingParams | None = None


class AdapterInfo(msgspec.Struct, frozen=True):
    """An adapter as a user sees it. Times are Unix seconds; 0 means never.

    ``bytes`` are what it takes of the adapter memory.
    """

    name: str
    uid: str = ""
    kind: str = ""
    state: AdapterState = AdapterState.LOADING
    source: str = ""
    max_rank: int = 0
    num_parameters: int = 0
    bytes: int = 0
    coverage: Coverage = Coverage({}, {})
    residency: Residency = Residency.DISK
    pinned: bool = False
    in_flight: int = 0
    loaded_at: float = 0.0
    last_used_at: float = 0.0
    error: str = ""
    generation: int = 0
    #: tokens it knows, where it adds some; 0: those of the base
    vocab_size: int = 0
    invocation_tokens: tuple[int, ...] = ()
    probe: Probe | None = None
    text: OwnText | None = None
    #: it ships a chat template that the server does not allow
    template_unused: bool = False
    #: the invocation tokens as text
    invocation_text: str = ""


class ModelInfo(msgspec.Struct, frozen=True):
    """The base model and the choices made at start, as GetModel reports them."""

    model_id: str
    architecture: str
    dtype: str
    device: str
    quantization: str
    tensor_parallel_size: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    sites: tuple[str, ...]
    backends: dict[str, str]
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_page_size: int
    kv_num_pages: int
    adapter_memory_bytes: int
    weight_bytes: int
    #: 0 where the model has no state-space layers; bytes are the first rank's
    state_num_slots: int = 0
    state_slot_bytes: int = 0
