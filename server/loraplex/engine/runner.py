"""One rank's compute: its part of the model, its pages and states, and its adapter tables. Takes work, gives logits.

Where the device has a stream, ``launch`` puts a whole step into it and returns: tokens that the step before still
draws are taken from its tensor on the device, and the sampled tokens are the only thing that anybody waits for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch

from loraplex.engine.batch import HeadRows, Ops, Packed, host_tensor, pack, prompt_rows
from loraplex.engine.inflight import DeviceTokens, SentWords
from loraplex.engine.sampler import DrawPlan, draw
from loraplex.engine.stream import Fetch, Stream, stream_of
from loraplex.engine.work import StepWork
from loraplex.models.base import BaseModel

#: rows of logits held at once for prompt logprobs (49,152 tokens x 64 rows x 4 bytes = 12 MiB)
_PROMPT_LOGPROB_ROWS: Final = 64


class StepGraphs(Protocol):
    """Captured forms of some steps."""

    def run(self, work: StepWork, token_ids: torch.Tensor) -> torch.Tensor | None:
        """Launch a step over ``token_ids`` ``[T]`` on the device. Gives the logits ``[S, V]`` float32 of its sampled
        rows, valid until the next call; None, and nothing launched, when no graph serves it."""
        ...


@dataclass(frozen=True, slots=True)
class PromptLogits:
    """Logits ``[n, V]`` of rows of a chunk's prompt, from its row ``first`` on."""

    chunk: int
    first: int
    logits: torch.Tensor


class Runner:
    """Owns the model, the cache and the states of this rank; called by its loop alone."""

    def __init__(self, model: BaseModel, ops: Ops, graphs: StepGraphs | None = None) -> None:
        """``graphs`` serve the steps they can; None: every step is launched kernel by kernel."""
        self.model = model
        self.ops = ops
        #: where steps are launched; None: each is over when its launch returns
        self.stream: Stream | None = stream_of(ops.device)
        self._graphs = graphs

    @property
    def has_graphs(self) -> bool:
        """Whether some steps are captured."""
        return self._graphs is not None

    # ---- a step that is over when it returns ----

    @torch.inference_mode()
    def run(self, work: StepWork) -> tuple[torch.Tensor | None, Iterator[PromptLogits]]:
        """Clear new pages, then one forward pass. Gives the logits ``[S, V]`` of the sampled rows, None where there are
        none, and those that prompt logprobs are made of, computed as they are asked for."""
        self.ops.clear(work.new_pages)
        logits = self._replay(work)
        if logits is not None:
            return logits, iter(())
        packed = pack(work, self.ops)
        hidden = self.model.forward(packed.forward)
        sampled = self._logits(hidden, packed.sampled) if work.num_sampled else None
        return sampled, self._prompt_logits(work, hidden)

    def _replay(self, work: StepWork) -> torch.Tensor | None:
        """Logits of a step that a graph serves."""
        if self._graphs is None or not work.is_decode:
            return None
        return self._graphs.run(work, host_tensor(work.token_ids, self.ops.device))

    def _logits(self, hidden: torch.Tensor, head: HeadRows) -> torch.Tensor:
        return self.model.head(hidden.index_select(0, head.rows), head.adapters)

    def _prompt_logits(self, work: StepWork, hidden: torch.Tensor) -> Iterator[PromptLogits]:
        for index, chunk in enumerate(work.chunks):
            for first in range(0, chunk.prompt_rows, _PROMPT_LOGPROB_ROWS):
                count = min(_PROMPT_LOGPROB_ROWS, chunk.prompt_rows - first)
                rows = prompt_rows(work, index, first, count, self.ops)
                yield PromptLogits(index, first, self._logits(hidden, rows))

    # ---- a step's work on the stream: nothing here waits for a value ----

    @torch.inference_mode()
    def launch(self, work: StepWork, before: DeviceTokens | None, drawn: DeviceTokens) -> Fetch:
        """Put a step in whose tokens the device draws. ``before``: those of the step before, which may be under way;
        ``drawn`` are set to this one's, for the host ``[S]``; -1 where logits are not finite."""
        assert self.stream is not None, "a step launched where none can be under way"
        sent = SentWords(work, self.stream.send(work.words))
        self.stream.put(lambda: self._begin(sent, before))
        logits = self._graphs.run(work, sent.token_ids) if self._graphs is not None else None
        packed = pack(work, self.ops, sent.token_ids) if logits is None else None
        return self.stream.fetch(lambda: self._finish(sent, drawn, logits, packed))

    def _begin(self, sent: SentWords, before: DeviceTokens | None) -> None:
        self.ops.clear(sent.work.new_pages)
        sent.fill_in(before)

    def _finish(
        self, sent: SentWords, drawn: DeviceTokens, logits: torch.Tensor | None, packed: Packed | None
    ) -> torch.Tensor:
        """The next step is given some token where this one's are not finite, because it looks them up before anybody
        knows that it will be of no use."""
        plan = DrawPlan(sent.work.num_sampled, sent.work.groups or (), np.empty((0, 0)))
        if packed is not None:
            hidden = self.model.forward(packed.forward)
            logits = self._logits(hidden, packed.sampled) if plan.num_rows else None
        if logits is None:
            return torch.empty(0, dtype=torch.int64, device=self.ops.device)
        tokens, finite = draw(logits, plan, sent.settings)
        drawn.are(tokens)
        return torch.where(finite, tokens, -1)
