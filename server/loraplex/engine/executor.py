"""Runs batches: decides where each step's tokens are drawn, has every rank do its share, and says what came of it.

Steps whose draws need values that the host alone has (penalties, ``min_tokens``), give more than tokens (logprobs) or
are from an adapter's larger vocabulary run to their end before ``launch`` returns, and so does every step of a device
without a stream.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from loraplex.engine.inflight import InFlight, StepResult
from loraplex.engine.ranks.orders import RunStep
from loraplex.engine.ranks.others import Others
from loraplex.engine.runner import PromptLogits, Runner
from loraplex.engine.sampler import Drawn, describe, plan_draws, sample
from loraplex.engine.sequence import Batch, Chunk
from loraplex.engine.work import work_of
from loraplex.types import TokenLogprob


class Executor:
    """Called by the engine loop alone."""

    def __init__(self, runner: Runner, others: Others) -> None:
        """``others``: ranks that do the same steps."""
        self.runner = runner
        self.others = others

    def overlaps(self, batch: Batch) -> bool:
        """Whether ``launch`` would return before the step has run, and so can follow one that has not run either."""
        return self.runner.stream is not None and not any(
            _needs_host(chunk) or self._is_wide(chunk) for chunk in batch.chunks
        )

    def run(self, batch: Batch) -> StepResult:
        """Run a non-empty batch to its end."""
        return self.launch(batch).wait()

    def launch(self, batch: Batch, previous: InFlight | None = None) -> InFlight:
        """Begin a non-empty batch: clear its new pages, one forward pass, then draw.

        ``previous`` is the step launched before it, where that has not been waited for; only a batch that ``overlaps``
        may follow one.

        Raises GroupLost: ranks are out of step with each other; of one rank alone, what it raised.
        """
        try:
            return self._launch(batch, previous)
        except Exception as error:
            raise self.others.blame(error) from error  # they are in the middle of the step, or past it

    def wait(self, step: InFlight) -> StepResult:
        """What came of a launched step, once it has run. Raises as ``launch`` does."""
        try:
            return step.wait(self.others.check if self.others.size > 1 else None)
        except Exception as error:
            raise self.others.blame(error) from error

    def _launch(self, batch: Batch, previous: InFlight | None) -> InFlight:
        if not self.overlaps(batch):
            assert previous is None, "a step that needs its tokens on the host follows one that has not run"
            return InFlight(batch, self._run(batch))
        step = InFlight(batch)
        plan = plan_draws(list(step.rows), self.runner.model.vocab_size)
        work = work_of(batch, plan, previous.rows if previous else None)
        self.others.tell(RunStep(work))
        step.fetching(self.runner.launch(work, previous.tokens if previous else None, step.tokens))
        return step

    def _is_wide(self, chunk: Chunk) -> bool:
        """Whether its draw is from more tokens than the base's, and so from logits of a shape of their own."""
        return chunk.sample and chunk.sequence.uses.vocab_size > self.runner.model.vocab_size

    def _run(self, batch: Batch) -> StepResult:
        work = work_of(batch)
        self.others.tell(RunStep(work))
        with torch.inference_mode():
            logits, prompt_logits = self.runner.run(work)
            drawn: list[Drawn] = []
            if logits is not None:
                drawn = sample(logits, [chunk.sequence for chunk in batch.chunks if chunk.sample])
            return StepResult(drawn, _prompt_logprobs(batch, prompt_logits))


def _prompt_logprobs(batch: Batch, found: Iterable[PromptLogits]) -> dict[int, list[TokenLogprob]]:
    """Logprobs of prompt tokens by chunk: row i of a chunk predicts the token after it."""
    out: dict[int, list[TokenLogprob]] = {}
    for part in found:
        chunk = batch.chunks[part.chunk]
        sequence, rows = chunk.sequence, out.setdefault(part.chunk, [])
        for i, logprobs in enumerate(part.logits.log_softmax(-1)):
            token = sequence.token_ids[chunk.start + part.first + i + 1]
            rows.append(describe(logprobs, token, sequence.request.output.logprobs))
    return out


def _needs_host(chunk: Chunk) -> bool:
    sequence = chunk.sequence
    if chunk.sample and sequence.needs_host:
        return True
    return sequence.request.output.prompt_logprobs and chunk.start < sequence.prompt_len - 1
