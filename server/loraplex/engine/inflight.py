"""A step in flight: what the host sends along, where its tokens will be, and what comes of it.

A token that is still being drawn has no value on the host. A sequence does not list it, its place among the token ids
that are sent holds ``UNKNOWN``, which no embedding takes, and the device fills it in from the step that draws it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from loraplex.engine.sampler import Drawn, DrawPlan
from loraplex.engine.sequence import Batch
from loraplex.engine.stream import Fetch
from loraplex.types import TokenLogprob

UNKNOWN: Final = -1
_DRAW_COLUMNS: Final = 6


@dataclass(frozen=True, slots=True)
class StepResult:
    """Of a step: one Drawn for each sampled chunk, in order, and prompt logprobs by chunk index."""

    drawn: list[Drawn]
    prompt_logprobs: Mapping[int, list[TokenLogprob]]


class InFlight:
    """A launched step. ``rows``: its sampled sequences and their rows of ``tokens``."""

    __slots__ = ("_fetch", "_result", "_tokens", "batch", "rows")

    def __init__(self, batch: Batch, result: StepResult | None = None) -> None:
        """``result``: of a step that was over when its launch returned."""
        self.batch = batch
        self.rows = {c.sequence: i for i, c in enumerate(c for c in batch.chunks if c.sample)} if result is None else {}
        self._result = result
        self._tokens: torch.Tensor | None = None
        self._fetch: Fetch | None = None

    @property
    def is_over(self) -> bool:
        """Whether ``wait`` has nothing to wait for."""
        return self._result is not None

    @property
    def tokens(self) -> torch.Tensor:
        """``[S]`` int64 on the device, for work put in after this step's: each some token of the vocabulary."""
        assert self._tokens is not None, "read before the step that draws it"
        return self._tokens

    def drew(self, tokens: torch.Tensor) -> None:
        """The step's own work says where its tokens are."""
        self._tokens = tokens

    def fetching(self, fetch: Fetch) -> None:
        """The launch is complete: ``fetch`` brings ``[S]`` tokens, -1 where logits were not finite."""
        self._fetch = fetch

    def wait(self) -> StepResult:
        """What came of the step, once it has run. Raises what it raised."""
        if self._result is None:
            assert self._fetch is not None, "a launch that did not complete"
            self._result = StepResult([Drawn(token) for token in self._fetch.wait()], {})
        return self._result


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All that a step takes from the host, as one array of 8-byte words, so that one copy carries it.

    In this order: T token ids; K places of unknown ones among them; the K rows where the step before draws those; the
    ``[6, R]`` settings of the draws, whose words are float64.
    """

    words: npt.NDArray[np.int64]
    num_tokens: int
    num_unknown: int

    @staticmethod
    def of(batch: Batch, previous: InFlight | None, draws: DrawPlan) -> StepInputs:
        """Of a batch whose unknown tokens, if there are any, are drawn by ``previous``."""
        ids: list[int] = []
        places: list[int] = []
        rows: list[int] = []
        for chunk in batch.chunks:
            sequence, stop = chunk.sequence, chunk.start + chunk.count
            if stop <= len(sequence.token_ids):
                ids += sequence.token_ids[chunk.start : stop]
                continue
            ids += sequence.token_ids[chunk.start : stop - 1]
            request_id = sequence.request.request_id
            assert stop == len(sequence.token_ids) + 1, f"request '{request_id}': more than one token is unknown"
            assert previous is not None, f"request '{request_id}': a token is unknown, and no step draws it"
            places.append(len(ids))
            rows.append(previous.rows[sequence])
            ids.append(UNKNOWN)
        head = np.array(ids + places + rows, dtype=np.int64)
        words = np.concatenate((head, draws.settings.view(np.int64).ravel())) if draws.groups else head
        return StepInputs(words, len(ids), len(places))

    def token_ids(self, sent: torch.Tensor) -> torch.Tensor:
        """``[T]`` of the words as they were sent, unknown ones not yet filled in."""
        return sent[: self.num_tokens]

    def fill_in(self, sent: torch.Tensor, previous: InFlight | None) -> None:
        """Put the tokens of ``previous`` in their places. Work for the device, after that step's."""
        if self.num_unknown:
            assert previous is not None
            places, rows = sent[self.num_tokens :][: 2 * self.num_unknown].view(2, -1)
            self.token_ids(sent).index_copy_(0, places, previous.tokens.index_select(0, rows))

    def settings(self, sent: torch.Tensor) -> torch.Tensor:
        """The settings of the draws, float64 ``[6, R]``."""
        words = sent[self.num_tokens + 2 * self.num_unknown :]
        return words.view(torch.float64).view(_DRAW_COLUMNS, -1)
