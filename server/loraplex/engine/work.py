"""A step in plain numbers: what each rank needs to do its share of it, and all that crosses to the other ranks.

A token that is still being drawn has no value on the host. A sequence does not list it, its place among the token ids
that are sent holds ``UNKNOWN``, which no embedding takes, and the device fills it in from the step that draws it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from loraplex.engine.sampler import DrawGroup, DrawPlan
from loraplex.engine.sequence import Batch, Chunk, Run
from loraplex.engine.sequence import Sequence as Generated
from loraplex_kernels.attention import SequenceSpan
from loraplex_kernels.segments import SegmentPlan, plan_rows
from loraplex_kernels.states import BLANK, StateSpan

UNKNOWN: Final = -1
Words = npt.NDArray[np.int64]


class ChunkWork(msgspec.Struct, frozen=True, array_like=True):
    """Tokens ``start : start+count`` of a sequence, on its ``pages``.

    ``runs`` are its rows by the terms that are on for them. The last row goes through the head where a token is drawn
    after it (``sample``), and so do the first ``prompt_rows``, for the logprobs of the tokens behind them.
    ``num_limited`` of its first rows are of the prompt. Where the model has states ``slot``, ``source`` and ``saves``
    are those of ``StateSpan``.
    """

    start: int
    count: int
    sample: bool
    pages: Sequence[int]
    runs: tuple[Run, ...]
    prompt_rows: int = 0
    num_limited: int = 0
    slot: int = BLANK
    source: int = BLANK
    saves: tuple[tuple[int, int], ...] = ()

    def runs_of(self, first: int, count: int) -> Iterator[Run]:
        """The runs of ``count`` of its rows from ``first`` on."""
        row, stop = 0, first + count
        for length, terms in self.runs:
            inside = min(row + length, stop) - max(row, first)
            if inside > 0:
                yield inside, terms
            row += length


class StepWork(msgspec.Struct, frozen=True, array_like=True):
    """A non-empty batch. ``words``, 8 bytes each, are sent to the device in one copy; in this order:

    T token ids; K places of unknown ones among them; the K rows of the step before that draw those; the ``[6, R]``
    float64 settings of the draws.

    ``groups`` is how tokens are drawn by the device, all of them greedily where it is empty; None: the host draws.
    ``own_rows``: an adapter of the step has rows of its own, of which a rank may hold none: what ranks launch must not
    hang on what each of them holds, or their sums would not fit. ``merged``: all rows use one merged form.
    """

    chunks: Sequence[ChunkWork]
    new_pages: Sequence[int]
    words: Words
    num_unknown: int = 0
    groups: tuple[DrawGroup, ...] | None = None
    own_rows: bool = False
    merged: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    @property
    def num_sampled(self) -> int:
        return sum(chunk.sample for chunk in self.chunks)

    @property
    def is_decode(self) -> bool:
        """Whether each chunk is one token whose next one is wanted: no prompt row needs a result of its own."""
        return all(chunk.count == 1 and chunk.sample for chunk in self.chunks)

    @property
    def token_ids(self) -> Words:
        """``[T]``, with ``UNKNOWN`` among them."""
        return self.words[: self.num_tokens]

    @property
    def runs(self) -> list[Run]:
        """All rows, in order, by the terms that are on for them."""
        return list(chain.from_iterable(chunk.runs for chunk in self.chunks))

    def segments(self) -> SegmentPlan:
        """The segments over all rows."""
        return plan_rows(chain.from_iterable(chunk.runs for chunk in self.chunks))

    def sampled_segments(self) -> SegmentPlan:
        """The segments over the sampled rows: each is behind the start of every adapter of its sequence."""
        return plan_rows((1, chunk.runs[-1][1]) for chunk in self.chunks if chunk.sample)

    def spans(self) -> list[SequenceSpan]:
        """What attention sees of each chunk."""
        return [SequenceSpan(chunk.count, chunk.start + chunk.count, chunk.pages) for chunk in self.chunks]

    def state_spans(self) -> list[StateSpan]:
        """What state-space layers see of each chunk."""
        return [StateSpan(c.count, c.slot, c.source, c.saves, c.num_limited) for c in self.chunks]

    def starts(self) -> Words:
        """The position of each chunk's first token."""
        return np.fromiter((chunk.start for chunk in self.chunks), np.int64, len(self.chunks))


def work_of(
    batch: Batch, draws: DrawPlan | None = None, rows_before: Mapping[Generated, int] | None = None
) -> StepWork:
    """The work of a non-empty batch whose tokens are drawn by ``draws``; None: by the host.

    ``rows_before``: which row of the step before, not waited for, draws a sequence's unknown token.
    """
    merged = _is_merged(batch)
    chunks = [_chunk_work(chunk, merged=merged) for chunk in batch.chunks]
    own_rows = merged or any(chunk.sequence.uses.own_rows for chunk in batch.chunks)
    if draws is None:
        ids = chain.from_iterable(c.sequence.token_ids[c.start : c.start + c.count] for c in batch.chunks)
        words = np.fromiter(ids, np.int64, batch.num_tokens)
        return StepWork(chunks, batch.new_pages, words, own_rows=own_rows, merged=merged)
    head, num_unknown = _known_and_unknown(batch.chunks, rows_before or {})
    words = np.concatenate((head, draws.settings.view(np.int64).ravel())) if draws.groups else head
    return StepWork(chunks, batch.new_pages, words, num_unknown, draws.groups, own_rows, merged)


def _is_merged(batch: Batch) -> bool:
    """Whether all rows may be computed by one merged form. Beside others its adapter is as good, and costs less: a step
    that multiplied by both the base and a merged matrix would read the weights twice."""
    forms = {chunk.sequence.uses.merged for chunk in batch.chunks}
    return len(forms) == 1 and "" not in forms


def _chunk_work(chunk: Chunk, *, merged: bool) -> ChunkWork:
    sequence, start, count = chunk.sequence, chunk.start, chunk.count
    prompt_rows = 0
    if sequence.request.output.prompt_logprobs:
        prompt_rows = max(min(start + count, sequence.prompt_len - 1) - start, 0)
    return ChunkWork(
        start,
        count,
        chunk.sample,
        sequence.pages,
        sequence.runs(start, count, merged=merged),
        prompt_rows,
        num_limited=max(min(start + count, sequence.prompt_len) - start, 0),
        slot=chunk.slot,
        source=chunk.source,
        saves=chunk.saves,
    )


def _known_and_unknown(chunks: Iterable[Chunk], rows_before: Mapping[Generated, int]) -> tuple[Words, int]:
    """Token ids, then places of the unknown ones among them, then the rows that draw those; how many are unknown."""
    ids: list[int] = []
    places: list[int] = []
    rows: list[int] = []
    for chunk in chunks:
        sequence, stop = chunk.sequence, chunk.start + chunk.count
        if stop <= len(sequence.token_ids):
            ids += sequence.token_ids[chunk.start : stop]
            continue
        ids += sequence.token_ids[chunk.start : stop - 1]
        request_id = sequence.request.request_id
        assert stop == len(sequence.token_ids) + 1, f"request '{request_id}': more than one token is unknown"
        assert sequence in rows_before, f"request '{request_id}': a token is unknown, and no step draws it"
        places.append(len(ids))
        rows.append(rows_before[sequence])
        ids.append(UNKNOWN)
    return np.array(ids + places + rows, dtype=np.int64), len(places)
