"""One rank's compute: the model, its key/value cache and its adapter tables. Takes a Batch, gives tokens.

Where the device has a stream, ``launch`` puts a whole step into it and returns: tokens that the step before still
draws are taken from its tensor on the device, and the sampled tokens are the only thing that anybody waits for. Steps
whose draws need values that the host alone has (penalties, ``min_tokens``), give more than tokens (logprobs) or are
from an adapter's larger vocabulary run to their end before ``launch`` returns, and so does every step of a device
without a stream.
"""

from __future__ import annotations

from typing import Final, Protocol

import torch

from loraplex.engine.batch import HeadRows, Ops, Packed, decode_token_ids, head_rows, host_tensor, is_decode, pack
from loraplex.engine.inflight import InFlight, StepInputs, StepResult
from loraplex.engine.sampler import Drawn, DrawPlan, describe, draw, plan_draws, sample
from loraplex.engine.sequence import Batch, Chunk
from loraplex.engine.stream import Stream, stream_of
from loraplex.models.base import BaseModel
from loraplex.types import TokenLogprob

#: rows of logits held at once for prompt logprobs (49,152 tokens x 64 rows x 4 bytes = 12 MiB)
_PROMPT_LOGPROB_ROWS: Final = 64


class StepGraphs(Protocol):
    """Captured forms of some steps."""

    def run(self, batch: Batch, token_ids: torch.Tensor) -> torch.Tensor | None:
        """Launch a step over ``token_ids`` ``[T]`` on the device. Gives the logits ``[S, V]`` float32 of its sampled
        rows, valid until the next call; None, and nothing launched, when no graph serves it."""
        ...


class Runner:
    """Owns the model and the cache of this rank; called by the engine loop alone."""

    def __init__(self, model: BaseModel, ops: Ops, graphs: StepGraphs | None = None) -> None:
        """``graphs`` serve the steps they can; None: every step is launched kernel by kernel."""
        self.model = model
        self.ops = ops
        #: where steps are launched; None: each is over when its launch returns
        self.stream: Stream | None = stream_of(ops.device)
        self._graphs = graphs

    def overlaps(self, batch: Batch) -> bool:
        """Whether ``launch`` would return before the step has run, and so can follow one that has not run either."""
        return self.stream is not None and not any(_needs_host(chunk) or self._is_wide(chunk) for chunk in batch.chunks)

    def run(self, batch: Batch) -> StepResult:
        """Run a non-empty batch to its end."""
        return self.launch(batch).wait()

    def launch(self, batch: Batch, previous: InFlight | None = None) -> InFlight:
        """Begin a non-empty batch: clear its new pages, one forward pass, then draw.

        ``previous`` is the step launched before it, where that has not been waited for; only a batch that ``overlaps``
        may follow one.
        """
        if self.stream is None or not self.overlaps(batch):
            assert previous is None, "a step that needs its tokens on the host follows one that has not run"
            return InFlight(batch, self._run(batch))
        step = InFlight(batch)
        plan = plan_draws(list(step.rows), self.model.vocab_size)
        inputs = StepInputs.of(batch, previous, plan)
        with torch.inference_mode():
            sent = self.stream.send(inputs.words)
            token_ids = inputs.token_ids(sent)
            self.stream.put(lambda: self._begin(batch, inputs, sent, previous))
            logits = self._graphs.run(batch, token_ids) if self._graphs is not None else None
            packed = pack(batch, self.ops, token_ids) if logits is None else None
            settings = inputs.settings(sent)
            step.fetching(self.stream.fetch(lambda: self._finish(step, plan, settings, logits, packed)))
        return step

    def _is_wide(self, chunk: Chunk) -> bool:
        """Whether its draw is from more tokens than the base's, and so from logits of a shape of their own."""
        return chunk.sample and chunk.sequence.uses.vocab_size > self.model.vocab_size

    # ---- a step's work on the stream: nothing here waits for a value ----

    def _begin(self, batch: Batch, inputs: StepInputs, sent: torch.Tensor, previous: InFlight | None) -> None:
        if batch.new_pages:
            self.ops.kv_cache.zero_pages(batch.new_pages)
        inputs.fill_in(sent, previous)

    def _finish(
        self,
        step: InFlight,
        plan: DrawPlan,
        settings: torch.Tensor,
        logits: torch.Tensor | None,
        packed: Packed | None,
    ) -> torch.Tensor:
        """The tokens for the host ``[S]``; -1 where logits are not finite. The next step is given others there,
        because it looks them up before anybody knows that it will be of no use."""
        if packed is not None:
            hidden = self.model.forward(packed.forward)
            logits = self._logits(hidden, packed.sampled) if plan.num_rows else None
        if logits is None:
            return torch.empty(0, dtype=torch.int64, device=self.ops.device)
        tokens, finite = draw(logits, plan, settings)
        step.drew(tokens)
        return torch.where(finite, tokens, -1)

    # ---- a step that is over when it returns ----

    def _run(self, batch: Batch) -> StepResult:
        with torch.inference_mode():
            if batch.new_pages:
                self.ops.kv_cache.zero_pages(batch.new_pages)
            sequences = [chunk.sequence for chunk in batch.chunks if chunk.sample]
            logits = self._replay(batch)
            if logits is not None:
                return StepResult(sample(logits, sequences), {})
            packed = pack(batch, self.ops)
            hidden = self.model.forward(packed.forward)
            drawn: list[Drawn] = []
            if sequences:
                drawn = sample(self._logits(hidden, packed.sampled), sequences)
            return StepResult(drawn, self._prompt_logprobs(batch, hidden))

    def _replay(self, batch: Batch) -> torch.Tensor | None:
        """Logits of a step that a graph serves."""
        if self._graphs is None or not is_decode(batch):
            return None
        return self._graphs.run(batch, host_tensor(decode_token_ids(batch.chunks), self.ops.device))

    def _logits(self, hidden: torch.Tensor, head: HeadRows) -> torch.Tensor:
        return self.model.head(hidden.index_select(0, head.rows), head.adapters)

    def _prompt_logprobs(self, batch: Batch, hidden: torch.Tensor) -> dict[int, list[TokenLogprob]]:
        found: dict[int, list[TokenLogprob]] = {}
        first_row = 0
        for index, chunk in enumerate(batch.chunks):
            if chunk.sequence.request.output.prompt_logprobs:
                rows = self._prompt_rows(chunk, first_row, hidden)
                if rows:
                    found[index] = rows
            first_row += chunk.count
        return found

    def _prompt_rows(self, chunk: Chunk, first_row: int, hidden: torch.Tensor) -> list[TokenLogprob]:
        """Logprobs of prompt tokens ``start+1 ..``: row i of the chunk predicts the token after it."""
        sequence = chunk.sequence
        wanted = min(chunk.start + chunk.count, sequence.prompt_len - 1) - chunk.start
        out: list[TokenLogprob] = []
        for offset in range(0, wanted, _PROMPT_LOGPROB_ROWS):
            count = min(_PROMPT_LOGPROB_ROWS, wanted - offset)
            part = Chunk(sequence, chunk.start + offset, count, sample=False)
            head = head_rows(first_row + offset, part, self.ops)
            logprobs = self._logits(hidden, head).log_softmax(-1)
            for i in range(count):
                token = sequence.token_ids[chunk.start + offset + i + 1]
                out.append(describe(logprobs[i], token, sequence.request.output.logprobs))
        return out


def _needs_host(chunk: Chunk) -> bool:
    sequence = chunk.sequence
    if chunk.sample and sequence.needs_host:
        return True
    return sequence.request.output.prompt_logprobs and chunk.start < sequence.prompt_len - 1
