"""From logits to tokens: penalties, temperature, filters, and one seeded draw per row.

Rows that want plain greedy cost one max over the vocabulary. A drawn row uses a uniform number that depends on its
seed and its position alone (splitmix64), so a seed gives the same tokens whatever else is in the batch.
Non-finite rows are found before anything is drawn and fail alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.engine.sequence import Sequence
from loraplex.types import SamplingParams, TokenLogprob, TopLogprob

#: candidates looked at before a whole-vocabulary sort is worth its time
_TOP_CANDIDATES: Final = 1024
_MASK64: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Drawn:
    """The outcome for one row: ``token_id`` is -1 when its logits were not finite."""

    token_id: int
    logprob: TokenLogprob | None = None


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone. Source: splitmix64 (Steele, Lea, Flood 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & _MASK64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & _MASK64
    return float((z ^ (z >> 31)) >> 11) / float(1 << 53)


def sample(logits: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: tuple[int, ...]) -> list[Drawn]:
    """One token for each row of ``logits`` ``[S, V]`` float32 (modified in place)."""
    best, greedy = logits.max(dim=-1)
    finite = torch.isfinite(best).tolist()
    tokens: list[int] = greedy.tolist()
    logprob_rows = [i for i, s in enumerate(sequences) if s.request.output.logprobs and finite[i]]
    raw = {i: logits[i].log_softmax(-1) for i in logprob_rows}
    for i, sequence in enumerate(sequences):
        if finite[i] and _is_special(sequence):
            tokens[i] = _draw(logits[i], sequence, eos_token_ids)
    return [
        Drawn(token if ok else -1, describe(raw[i], token, sequences[i].request.output.logprobs) if i in raw else None)
        for i, (token, ok) in enumerate(zip(tokens, finite, strict=True))
    ]


def describe(logprobs: torch.Tensor, token_id: int, top: int) -> TokenLogprob:
    """A token's logprob with the ``top`` best beside it, out of ``[V]`` log-probabilities of the untouched logits."""
    values, indices = logprobs.topk(min(top, logprobs.shape[-1]))
    pairs = zip(indices.tolist(), values.tolist(), strict=True)
    return TokenLogprob(token_id, float(logprobs[token_id]), tuple(TopLogprob(i, v) for i, v in pairs))


def _is_special(sequence: Sequence) -> bool:
    p = sequence.request.sampling
    return (
        p.temperature > 0
        or p.repetition_penalty != 1
        or p.presence_penalty != 0
        or p.frequency_penalty != 0
        or sequence.num_outputs < sequence.request.stop.min_tokens
    )


def _draw(row: torch.Tensor, sequence: Sequence, eos_token_ids: tuple[int, ...]) -> int:
    params, stop = sequence.request.sampling, sequence.request.stop
    _apply_penalties(row, sequence)
    if sequence.num_outputs < stop.min_tokens:
        row[list(eos_token_ids + stop.stop_token_ids)] = -math.inf
    if params.temperature <= 0:
        return int(row.argmax())
    u = uniform(sequence.seed, sequence.num_outputs)
    # subtract the best before dividing, so that a tiny temperature cannot overflow
    scaled = (row - row.max()) / params.temperature
    return _pick(scaled, params, u)


def _apply_penalties(row: torch.Tensor, sequence: Sequence) -> None:
    params = sequence.request.sampling
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(sequence.token_ids)), dtype=torch.int64, device=row.device)
        score = row[seen]
        factor = params.repetition_penalty
        row[seen] = torch.where(score > 0, score / factor, score * factor)
    if (params.presence_penalty or params.frequency_penalty) and sequence.output_counts:
        ids, counts = zip(*sequence.output_counts.items(), strict=True)
        where = torch.tensor(ids, dtype=torch.int64, device=row.device)
        times = torch.tensor(counts, dtype=row.dtype, device=row.device)
        row[where] -= params.presence_penalty + params.frequency_penalty * times


def _pick(scaled: torch.Tensor, params: SamplingParams, u: float) -> int:
    """Inverse-CDF draw from softmax(scaled) ``[V]`` after top-k, then top-p and min-p of what top-k left."""
    vocab = scaled.shape[-1]
    if params.top_k == 0 and params.top_p >= 1:
        weights = scaled.exp()
        if params.min_p > 0:
            weights = torch.where(weights >= params.min_p, weights, 0.0)  # the best weight is exp(0) = 1
        return _invert(weights, u)
    total = float(scaled.exp().sum())
    count = min(params.top_k or _TOP_CANDIDATES, vocab)
    while True:
        values, indices = scaled.topk(count)
        weights = values.exp()
        mass = float(weights.sum()) if params.top_k else total
        before = weights.cumsum(-1) - weights
        if params.top_k or count == vocab or float(before[-1]) >= params.top_p * mass:
            break
        count = vocab  # the nucleus is wider than the candidates: sort all
    keep = (before < params.top_p * mass) & (weights >= params.min_p)
    keep[0] = True
    return int(indices[_invert(torch.where(keep, weights, 0.0), u)])


def _invert(weights: torch.Tensor, u: float) -> int:
    """The index whose share of the cumulative sum holds ``u`` of the total."""
    cdf = weights.double().cumsum(-1)
    index = int(torch.searchsorted(cdf, u * float(cdf[-1]), right=True))
    return min(index, int(weights.nonzero()[-1]))
