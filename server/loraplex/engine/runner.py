"""One rank's compute: the model, its key/value cache and its adapter tables. Takes a Batch, gives tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from loraplex.engine.batch import HeadRows, Ops, Packed, decode_token_ids, head_rows, host_tensor, is_decode, pack
from loraplex.engine.graphs import DecodeGraphs
from loraplex.engine.sampler import Drawn, describe, sample
from loraplex.engine.sequence import Batch, Chunk
from loraplex.models.base import BaseModel
from loraplex.types import TokenLogprob

#: rows of logits held at once for prompt logprobs (49,152 tokens x 64 rows x 4 bytes = 12 MiB)
_PROMPT_LOGPROB_ROWS: Final = 64


@dataclass(frozen=True, slots=True)
class StepResult:
    """Of a step: one Drawn for each sampled chunk, in order, and prompt logprobs by chunk index."""

    drawn: list[Drawn]
    prompt_logprobs: dict[int, list[TokenLogprob]]


class Runner:
    """Owns the model and the cache of this rank; called by the engine loop alone."""

    def __init__(
        self, model: BaseModel, ops: Ops, eos_token_ids: tuple[int, ...], graphs: DecodeGraphs | None = None
    ) -> None:
        """``graphs`` serve the decode steps they can; None: every step is launched kernel by kernel."""
        self.model = model
        self.ops = ops
        self._eos_token_ids = eos_token_ids
        self._graphs = graphs

    def run(self, batch: Batch) -> StepResult:
        """Run a non-empty batch: clear its new pages, one forward pass, then draw."""
        with torch.inference_mode():
            if batch.new_pages:
                self.ops.kv_cache.zero_pages(batch.new_pages)
            logits = self._replay(batch)
            if logits is not None:
                sequences = [chunk.sequence for chunk in batch.chunks]
                return StepResult(sample(logits, sequences, self._eos_token_ids), {})
            packed = pack(batch, self.ops)
            hidden = self.model.forward(packed.forward)
            drawn = self._draw(batch, packed, hidden)
            return StepResult(drawn, self._prompt_logprobs(batch, hidden))

    def _replay(self, batch: Batch) -> torch.Tensor | None:
        """Logits of a step that a graph serves."""
        if self._graphs is None or not is_decode(batch):
            return None
        return self._graphs.run(batch, host_tensor(decode_token_ids(batch.chunks), self.ops.device))

    def _draw(self, batch: Batch, packed: Packed, hidden: torch.Tensor) -> list[Drawn]:
        sequences = [chunk.sequence for chunk in batch.chunks if chunk.sample]
        if not sequences:
            return []
        return sample(self._logits(hidden, packed.sampled), sequences, self._eos_token_ids)

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
            head = head_rows(first_row + offset, count, chunk, self.ops)
            logprobs = self._logits(hidden, head).log_softmax(-1)
            for i in range(count):
                token = sequence.token_ids[chunk.start + offset + i + 1]
                out.append(describe(logprobs[i], token, sequence.request.output.logprobs))
        return out
