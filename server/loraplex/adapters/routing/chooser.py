"""How a router chooses: a gather from a table of the vocabulary, a mean, a softmax. On the host, in microseconds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import numpy as np
import numpy.typing as npt

from loraplex.types import Candidate, RouterInfo

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]

#: candidates that an answer names
_TOLD: Final = 2


class Chooser:
    """A router in use. Immutable.

    ``scores`` is ``[vocab, sum(widths)]``, float32, finite: how well each token fits each column, of which adapter i
    has ``widths[i]`` side by side, in the order of ``info.adapters``. A prompt's score of a column is the mean over its
    tokens, and that of an adapter its best column's; probabilities are the softmax of the scores over
    ``info.temperature``.
    """

    def __init__(self, info: RouterInfo, widths: Sequence[int], scores: npt.NDArray[np.float32]) -> None:
        assert (len(widths), scores.shape[1]) == (len(info.adapters), sum(widths))
        self.info = info
        self._scores = scores
        self._starts = np.array([0, *accumulate(widths[:-1])])

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self._scores.nbytes

    def scores(self, token_ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """How well a prompt of one token or more fits each adapter, ``[adapters]``. All ids are in the vocabulary."""
        mean = self._scores[np.asarray(token_ids)].mean(axis=0, dtype=np.float64)
        best: npt.NDArray[np.float64] = np.maximum.reduceat(mean, self._starts)
        return best

    def probabilities(self, token_ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """Of each adapter, ``[adapters]``; they sum to 1."""
        return softmax(self.scores(token_ids), self.info.temperature)

    def choose(self, token_ids: Sequence[int]) -> tuple[str, tuple[Candidate, ...]]:
        """The adapter for a prompt (empty: the base) and the best two candidates, best first; of equal ones the one
        that the router names first."""
        info, found = self.info, self.probabilities(token_ids)
        order = np.argsort(-found, kind="stable")[:_TOLD]
        candidates = tuple(Candidate(info.adapters[index], float(found[index])) for index in order)
        best = candidates[0]
        return best.name if best.probability >= info.threshold else info.default, candidates


def softmax(scores: Floats, temperature: float) -> npt.NDArray[np.float64]:
    """Of ``scores / temperature`` over the last axis."""
    shifted = np.exp((scores - scores.max(axis=-1, keepdims=True)).astype(np.float64) / temperature)
    total: npt.NDArray[np.float64] = shifted / shifted.sum(axis=-1, keepdims=True)
    return total
