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
from torch.nn import functional

from loraplex.engine.sequence import Sequence
from loraplex.types import SamplingParams, TokenLogprob, TopLogprob

#: candidates of a nucleus looked at first, and next: the best 64 of 32 rows of 49,152 cost 0.9 ms, the best 1,024 14 ms
_FEW: Final = 64
_MANY: Final = 1024
#: tokens compared at once for the best one
_ARGMAX_BLOCK: Final = 128
#: weights summed at once before sums are summed
_BLOCK: Final = 256
#: temperatures below this are this: smaller ones would not be numbers of float32 any more
_COLDEST: Final = 1e-6
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
    finite, tokens = _best(logits)
    wanted = [i for i, s in enumerate(sequences) if s.request.output.logprobs and finite[i]]
    raw = {i: logits[i].log_softmax(-1) for i in wanted}
    drawn: list[int] = []
    for i, sequence in enumerate(sequences):
        if finite[i] and _is_adjusted(sequence):
            _adjust(logits[i], sequence, eos_token_ids)
            tokens[i] = int(logits[i].argmax())
        if finite[i] and sequence.request.sampling.temperature > 0:
            drawn.append(i)
    for filtered in (False, True):
        rows = [i for i in drawn if _is_filtered(sequences[i].request.sampling) is filtered]
        if rows:
            mine = logits if len(rows) == len(sequences) else logits[rows]
            chosen = _draw(mine, [sequences[i] for i in rows], filtered=filtered)
            for i, token in zip(rows, chosen, strict=True):
                tokens[i] = token
    return [
        Drawn(token if ok else -1, describe(raw[i], token, sequences[i].request.output.logprobs) if i in raw else None)
        for i, (token, ok) in enumerate(zip(tokens, finite, strict=True))
    ]


def describe(logprobs: torch.Tensor, token_id: int, top: int) -> TokenLogprob:
    """A token's logprob with the ``top`` best beside it, out of ``[V]`` log-probabilities of the untouched logits."""
    values, indices = logprobs.topk(min(top, logprobs.shape[-1]))
    pairs = zip(indices.tolist(), values.tolist(), strict=True)
    return TokenLogprob(token_id, float(logprobs[token_id]), tuple(TopLogprob(i, v) for i, v in pairs))


def _is_adjusted(sequence: Sequence) -> bool:
    p = sequence.request.sampling
    return (
        p.repetition_penalty != 1
        or p.presence_penalty != 0
        or p.frequency_penalty != 0
        or sequence.num_outputs < sequence.request.stop.min_tokens
    )


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1


def _adjust(row: torch.Tensor, sequence: Sequence, eos_token_ids: tuple[int, ...]) -> None:
    """Penalties, and no end before ``min_tokens``, on one row ``[V]``."""
    params, stop = sequence.request.sampling, sequence.request.stop
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
    if sequence.num_outputs < stop.min_tokens:
        row[list(eos_token_ids + stop.stop_token_ids)] = -math.inf


def _best(logits: torch.Tensor) -> tuple[list[bool], list[int]]:
    """Per row of ``[S, V]``: whether it is finite, and its best token, the first of equals."""
    num_rows, vocab = logits.shape
    if vocab % _ARGMAX_BLOCK:
        best, token = logits.max(dim=-1)
        return torch.isfinite(best).tolist(), token.tolist()
    blocks = logits.view(num_rows, -1, _ARGMAX_BLOCK)  # five times as fast as one pass: see docs/PERFORMANCE.md
    tops = blocks.amax(-1)
    block = tops.argmax(-1)
    inside = blocks[torch.arange(num_rows, device=logits.device), block].argmax(-1)
    return torch.isfinite(tops.amax(-1)).tolist(), (block * _ARGMAX_BLOCK + inside).tolist()


def _draw(logits: torch.Tensor, sequences: Seq[Sequence], *, filtered: bool) -> list[int]:
    """A draw for each row of ``[R, V]``. No row's outcome depends on another's."""
    params = [s.request.sampling for s in sequences]
    u = _column([uniform(s.seed, s.num_outputs) for s in sequences], logits, torch.float64)
    chances = torch.softmax(logits / _column([max(p.temperature, _COLDEST) for p in params], logits), dim=-1)
    if filtered:
        return _draw_filtered(chances, params, u, _FEW)
    if any(p.min_p > 0 for p in params):
        least = _column([p.min_p for p in params], chances) * chances.amax(-1, keepdim=True)
        chances = torch.where(chances >= least, chances, 0.0)
    return _invert(chances, u)


def _draw_filtered(
    chances: torch.Tensor, params: Seq[SamplingParams], u: torch.Tensor, num_candidates: int
) -> list[int]:
    """Top-k first, then top-p and min-p of what top-k left. Rows whose nucleus is wider are drawn again from more."""
    vocab = chances.shape[-1]
    count = min(vocab, max([num_candidates, *(p.top_k for p in params)]))
    top_k = _column([p.top_k or vocab for p in params], chances, torch.int64)
    top_p, min_p = _column([p.top_p for p in params], chances), _column([p.min_p for p in params], chances)
    values, indices = chances.topk(count)
    weights = torch.where(torch.arange(count, device=chances.device) < top_k, values, 0.0)
    mass = torch.where(top_k < vocab, weights.sum(-1, keepdim=True), 1.0)
    sums = weights.cumsum(-1)
    wide = ((top_k > count) & (sums[:, -1:] < top_p * mass)).squeeze(-1).tolist()
    keep = (sums - weights < top_p * mass) & (weights >= min_p * values[:, :1])
    keep[:, 0] = True
    places = torch.tensor(_invert(torch.where(keep, weights, 0.0), u), device=chances.device)
    tokens: list[int] = indices.gather(1, places.unsqueeze(1)).squeeze(1).tolist()
    again = [i for i, is_wide in enumerate(wide) if is_wide] if count < vocab else []
    if again:
        more = _MANY if count < _MANY else vocab
        redrawn = _draw_filtered(chances[again], [params[i] for i in again], u[again], more)
        for i, token in zip(again, redrawn, strict=True):
            tokens[i] = token
    return tokens


def _invert(weights: torch.Tensor, u: torch.Tensor) -> list[int]:
    """Per row of ``[R, N]``, the index whose share of the cumulative sum holds ``u`` ``[R, 1]`` of the total.

    In two levels, blocks and then one block: only sums of blocks are taken in double precision.
    """
    if weights.shape[-1] % _BLOCK:
        weights = functional.pad(weights, (0, -weights.shape[-1] % _BLOCK))
    blocks = weights.view(weights.shape[0], -1, _BLOCK)
    ends = blocks.sum(-1).double().cumsum(-1)  # [R, N / block]
    target = u * ends[:, -1:]
    block = _first_above(ends, target)
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inner = blocks[torch.arange(len(blocks), device=weights.device), block.squeeze(1)].double().cumsum(-1)
    place = _first_above(inner, (target - start).clamp_(min=0.0))
    tokens: list[int] = (block * _BLOCK + place).squeeze(1).tolist()
    return tokens


def _first_above(ends: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Per row, the first index whose rising ``ends`` pass ``target``; always one where they rise, whatever rounding."""
    below_all = torch.nextafter(ends[:, -1:], torch.zeros((), dtype=ends.dtype))
    return torch.searchsorted(ends, torch.minimum(target, below_all), right=True)


def _column(values: Seq[float], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``[R, 1]`` beside ``like``."""
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device).unsqueeze(1)
