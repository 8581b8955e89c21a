"""A step in flight: what is sent along with it as the device has it, where its tokens will be, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.engine.sampler import Drawn
from loraplex.engine.sequence import Batch
from loraplex.engine.stream import Fetch
from loraplex.engine.work import StepWork
from loraplex.types import TokenLogprob

_DRAW_COLUMNS: Final = 6


@dataclass(frozen=True, slots=True)
class StepResult:
    """Of a step: one Drawn for each sampled chunk, in order, and prompt logprobs by chunk index."""

    drawn: list[Drawn]
    prompt_logprobs: Mapping[int, list[TokenLogprob]]


class DeviceTokens:
    """Where a step's drawn tokens will be, on the device."""

    __slots__ = ("_tokens",)

    def __init__(self) -> None:
        self._tokens: torch.Tensor | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """``[S]`` int64, for work put in after that step's: each some token of the vocabulary."""
        assert self._tokens is not None, "read before the step that draws it"
        return self._tokens

    def are(self, tokens: torch.Tensor) -> None:
        """The step's own work says where they are."""
        self._tokens = tokens


class InFlight:
    """A launched step. ``rows``: its sampled sequences and their rows of ``tokens``."""

    __slots__ = ("_fetch", "_result", "batch", "rows", "tokens")

    def __init__(self, batch: Batch, result: StepResult | None = None) -> None:
        """``result``: of a step that was over when its launch returned."""
        self.batch = batch
        self.rows = {c.sequence: i for i, c in enumerate(c for c in batch.chunks if c.sample)} if result is None else {}
        self.tokens = DeviceTokens()
        self._result = result
        self._fetch: Fetch | None = None

    @property
    def is_over(self) -> bool:
        """Whether ``wait`` has nothing to wait for."""
        return self._result is not None

    def fetching(self, fetch: Fetch) -> None:
        """The launch is complete: ``fetch`` brings ``[S]`` tokens, -1 where logits were not finite."""
        self._fetch = fetch

    def wait(self, watch: Callable[[], None] | None = None) -> StepResult:
        """What came of the step, once it has run; ``watch`` as in ``Fetch.wait``. Raises what it raised."""
        if self._result is None:
            assert self._fetch is not None, "a launch that did not complete"
            self._result = StepResult([Drawn(token) for token in self._fetch.wait(watch)], {})
        return self._result


@dataclass(frozen=True, slots=True)
class SentWords:
    """The words of ``work`` on the device."""

    work: StepWork
    words: torch.Tensor

    @property
    def token_ids(self) -> torch.Tensor:
        """``[T]``, unknown ones not filled in until ``fill_in``."""
        return self.words[: self.work.num_tokens]

    def fill_in(self, before: DeviceTokens | None) -> None:
        """Put the tokens of the step before in their places. Work for the device, after that step's."""
        num_tokens, num_unknown = self.work.num_tokens, self.work.num_unknown
        if num_unknown:
            assert before is not None
            places, rows = self.words[num_tokens:][: 2 * num_unknown].view(2, -1)
            self.token_ids.index_copy_(0, places, before.tensor.index_select(0, rows))

    @property
    def settings(self) -> torch.Tensor:
        """The settings of the draws, float64 ``[6, R]``."""
        words = self.words[self.work.num_tokens + 2 * self.work.num_unknown :]
        return words.view(torch.float64).view(_DRAW_COLUMNS, -1)
