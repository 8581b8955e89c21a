"""The nouns of a step: a Sequence in the making, a Chunk of it, and the Batch of chunks that one step runs.

Sequences are mutable and touched by the engine loop alone. No torch here.
"""

from __future__ import annotations

import enum
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise

from loraplex.engine.uses import Uses
from loraplex.state.lineage import Lineage
from loraplex.state.pages import Published
from loraplex.state.slots import NO_SLOT, Snapshot
from loraplex.types import Request, TokenLogprob
from loraplex_kernels.segments import Term

RowOrder = tuple[tuple[tuple[int, float], ...], tuple[int, float, int]]
"""Where a sequence's rows stand among others of their phase: by adapters (slots and weights), then by order."""

Run = tuple[int, tuple[Term, ...]]
"""A number of tokens of one sequence that stand side by side, and the terms that are on for all of them."""


class SequenceState(enum.Enum):
    """Where a sequence is."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(frozen=True, slots=True)
class Origin:
    """Who asked: the front end's socket identity and its ticket."""

    frontend: bytes
    ticket: int


@dataclass(frozen=True, slots=True)
class Save:
    """States behind the first ``num_tokens`` tokens, a multiple of the page size, on their way into ``slot``;
    ``moving``: instead of the last such ones of the same sequence."""

    num_tokens: int
    slot: int
    moving: bool


@dataclass(slots=True)
class HeldStates:
    """What a running sequence has of the state pool."""

    slot: int
    #: where its next chunk finds the states before it; ``NO_SLOT``: it begins
    source: int
    #: numbers of prompt tokens behind which states are to be saved
    borders: tuple[int, ...] = ()
    #: launched, or about to be, and not known to be finite yet
    saves: list[Save] = field(default_factory=list)
    #: the latest states of its answer that were saved
    moving: Snapshot | None = None


class Sequence:
    """One generation. ``token_ids`` is prompt + output as far as it is known here.

    ``num_unknown`` more tokens are being drawn by steps that were launched and not yet waited for: counts include
    them, ``token_ids`` never does. The first ``num_computed`` tokens are in the cache, or will be when the steps
    launched so far have run.
    """

    __slots__ = (
        "_last_start",
        "adapters",
        "admitted_s",
        "arrival_s",
        "draws_on_host",
        "eos_token_ids",
        "first_token_s",
        "lineage",
        "max_tokens",
        "min_tokens",
        "num_cached_prompt",
        "num_computed",
        "num_unknown",
        "order",
        "origin",
        "output_counts",
        "pages",
        "prompt_len",
        "prompt_logprobs",
        "published",
        "request",
        "row_order",
        "seed",
        "state",
        "states",
        "terms",
        "token_ids",
        "uses",
    )

    def __init__(
        self,
        origin: Origin,
        request: Request,
        uses: Uses,
        seed: int,
        arrival_s: float,
        max_model_len: int = sys.maxsize,
    ) -> None:
        self.origin = origin
        self.request = request
        self.uses = uses
        self.adapters = uses.resolved
        #: what ends it, beside the request's own stop tokens
        self.eos_token_ids = uses.eos_token_ids
        self.seed = seed
        self.arrival_s = arrival_s
        self.order = (0, 0.0, 0)  # set by the scheduler
        self.row_order: RowOrder = ((), self.order)  # set by the scheduler
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.prompt_len = len(self.token_ids)
        #: tokens, prompt included, at which it ends whatever they are
        self.max_tokens = min(self.prompt_len + request.stop.max_tokens, max_model_len)
        #: and before which it does not end by a token
        self.min_tokens = self.prompt_len + request.stop.min_tokens
        self.draws_on_host = request.output.logprobs > 0 or request.sampling.is_penalized
        # what a merged form had a part in differs in rounding from what the adapter itself computes
        self.lineage = Lineage(tuple((on.start, (uses.merged or on.uid, on.weight)) for on in uses.active))
        self._last_start = max((on.start for on in uses.active), default=0)
        self.state = SequenceState.WAITING
        self.num_computed = 0
        self.num_unknown = 0
        self.num_cached_prompt = -1  # not admitted yet
        self.pages: list[int] = []
        self.published = Published()
        #: while it runs, where the model has state-space layers
        self.states: HeldStates | None = None
        #: one for each of its ``uids``, while it runs
        self.terms: tuple[Term, ...] = ()
        self.admitted_s = 0.0
        self.first_token_s = 0.0
        self.output_counts: Counter[int] = Counter()
        self.prompt_logprobs: list[TokenLogprob] = []

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output, unknown ones included."""
        return len(self.token_ids) + self.num_unknown

    @property
    def num_outputs(self) -> int:
        """Output tokens that are known."""
        return len(self.token_ids) - self.prompt_len

    @property
    def num_draws(self) -> int:
        """Output tokens drawn so far, unknown ones included: the position of the next draw."""
        return len(self.token_ids) + self.num_unknown - self.prompt_len

    @property
    def is_full(self) -> bool:
        """Whether no further token can be wanted, though the last ones may still be unknown."""
        return len(self.token_ids) + self.num_unknown >= self.max_tokens

    @property
    def needs_host(self) -> bool:
        """Whether the next draw needs the tokens before it on the host, or gives more than a token."""
        return self.draws_on_host or len(self.token_ids) + self.num_unknown < self.min_tokens

    @property
    def uids(self) -> tuple[str, ...]:
        """Content digests of what this sequence needs on the device, in the order of its terms: its active adapters,
        and the merged form of a lone one."""
        merged = self.uses.merged
        return (*(on.uid for on in self.uses.active), *((merged,) if merged else ()))

    def give_up_merged(self) -> None:
        """Be served by the adapter itself from now on. For one that does not run."""
        assert not self.terms, "a merged form is given up by a sequence that runs with it"
        self.uses = replace(self.uses, merged="")

    def runs(self, start: int, count: int, *, merged: bool = False) -> tuple[Run, ...]:
        """Tokens ``start : start+count`` by the terms that are on there; a chunk may lie across a start. ``merged``: by
        its merged form."""
        if self.uses.merged:
            return ((count, self.terms[1:] if merged else self.terms[:1]),)
        if start >= self._last_start:
            return ((count, self.terms),)
        stop = start + count
        cuts = sorted({start, stop, *(on.start for on in self.uses.active if start < on.start < stop)})
        return tuple((end - first, self._terms_at(first)) for first, end in pairwise(cuts))

    def _terms_at(self, position: int) -> tuple[Term, ...]:
        active = zip(self.uses.active, self.terms, strict=True)
        return tuple(term for on, term in active if on.start <= position)

    def append(self, token_id: int) -> None:
        """The first unknown token is known now."""
        assert self.num_unknown > 0, "a token that no step drew"
        self.num_unknown -= 1
        self.token_ids.append(token_id)
        self.output_counts[token_id] += 1


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start : start+count`` of a sequence in one step; ``sample`` when a new token is drawn after the last.

    Of a model with states: they are read from ``source``, written to ``slot``, and behind the first n tokens of the
    chunk to a further slot for each (n, slot) of ``saves``.
    """

    sequence: Sequence
    start: int
    count: int
    sample: bool
    slot: int = NO_SLOT
    source: int = NO_SLOT
    saves: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class Batch:
    """What one step runs: single-token chunks first, then longer ones, equal adapters side by side in each group."""

    chunks: list[Chunk] = field(default_factory=list)
    #: pages that changed hands in this step and must be cleared before it
    new_pages: list[int] = field(default_factory=list)
    num_preempted: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)
