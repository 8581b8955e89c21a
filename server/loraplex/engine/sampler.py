"""From logits to tokens: penalties, temperature, filters, and one seeded draw per row.

Rows that want plain greedy cost one max over the vocabulary. A drawn row uses a uniform number that depends on its
seed and its position alone (splitmix64), so a seed gives the same tokens whatever else is in the batch.
Non-finite rows fail alone.

Two forms of the same arithmetic. ``sample`` gives values and may look at what it computes: it starts a nucleus from few
candidates and draws again from more where they were too few. ``draw`` gives tensors and never waits for one: whatever
depends on values is taken from the whole sorted vocabulary. A seed gives the same tokens in both, as long as no two
candidates are equally likely to the last bit: which of those a sort puts first is its own business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
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


@dataclass(frozen=True, slots=True)
class DrawGroup:
    """Rows of a step that are drawn alike, by index among the sampled ones."""

    rows: tuple[int, ...]
    #: best tokens that a nucleus is cut from; 0: no top-k and no top-p
    num_candidates: int
    min_p: bool


@dataclass(frozen=True, slots=True)
class DrawPlan:
    """How the sampled rows of a step are drawn: known before their logits are. Rows in no group are greedy."""

    num_rows: int
    groups: tuple[DrawGroup, ...]
    #: per drawn row, group after group: its index, then what ``_Settings`` lists; float64 ``[6, R]``
    settings: np.ndarray


class _Settings(NamedTuple):
    """Of R rows, each ``[R, 1]``."""

    u: torch.Tensor  # float64
    temperature: torch.Tensor
    top_k: torch.Tensor  # int64
    top_p: torch.Tensor
    min_p: torch.Tensor

    @staticmethod
    def of(columns: torch.Tensor) -> _Settings:
        """Out of float64 ``[5, R]``, which holds each of them exactly."""
        u, temperature, top_k, top_p, min_p = columns.unsqueeze(-1).unbind(0)
        return _Settings(u, temperature.float(), top_k.long(), top_p.float(), min_p.float())


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone. Source: splitmix64 (Steele, Lea, Flood 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & _MASK64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = ((z ^ (z >> shift)) * factor) & _MASK64
    return float((z ^ (z >> 31)) >> 11) / float(1 << 53)


def sample(logits: torch.Tensor, sequences: Seq[Sequence]) -> list[Drawn]:
    """One token for each row of ``logits`` ``[S, V]`` float32 (modified in place).

    Where a sequence knows fewer than V tokens, its row is drawn as if there were no others: a sum over more numbers,
    be they zeros, may round differently.
    """
    width = logits.shape[-1]
    widths = [min(sequence.uses.vocab_size or width, width) for sequence in sequences]
    if min(widths, default=width) == width:
        return _sample(logits, sequences)
    drawn: dict[int, Drawn] = {}
    for one in sorted(set(widths)):
        rows = [i for i, wide in enumerate(widths) if wide == one]
        narrow = logits[rows, :one].contiguous()
        drawn.update(zip(rows, _sample(narrow, [sequences[i] for i in rows]), strict=True))
    return [drawn[i] for i in range(len(sequences))]


def _sample(logits: torch.Tensor, sequences: Seq[Sequence]) -> list[Drawn]:
    """Of rows that know all V tokens."""
    finite, tokens = (found.tolist() for found in _best(logits))
    wanted = [i for i, s in enumerate(sequences) if s.request.output.logprobs and finite[i]]
    raw = {i: logits[i].log_softmax(-1) for i in wanted}
    drawn: list[int] = []
    for i, sequence in enumerate(sequences):
        if finite[i] and _is_adjusted(sequence):
            _adjust(logits[i], sequence)
            tokens[i] = int(logits[i].argmax())
        if finite[i] and sequence.request.sampling.temperature > 0:
            drawn.append(i)
    for filtered in (False, True):
        rows = [i for i in drawn if _is_filtered(sequences[i].request.sampling) is filtered]
        if rows:
            mine = logits if len(rows) == len(sequences) else logits[rows]
            for i, token in zip(rows, _draw_now(mine, [sequences[i] for i in rows], filtered), strict=True):
                tokens[i] = token
    return [
        Drawn(token if ok else -1, describe(raw[i], token, sequences[i].request.output.logprobs) if i in raw else None)
        for i, (token, ok) in enumerate(zip(tokens, finite, strict=True))
    ]


def plan_draws(sequences: Seq[Sequence], vocab: int) -> DrawPlan:
    """How the next tokens of these sequences, none of which ``needs_host``, are drawn."""
    groups: list[DrawGroup] = []
    drawn = [(i, s.request.sampling) for i, s in enumerate(sequences) if s.request.sampling.temperature > 0]
    plain = [i for i, p in drawn if not _is_filtered(p)]
    bounded = [i for i, p in drawn if _is_filtered(p) and 0 < p.top_k <= _MANY]
    unbounded = [i for i, p in drawn if _is_filtered(p) and not 0 < p.top_k <= _MANY]
    for rows, least in ((plain, 0), (bounded, _FEW), (unbounded, vocab)):
        if rows:
            params = [sequences[i].request.sampling for i in rows]
            count = min(vocab, max(p.top_k for p in params)) if rows is bounded else 0
            groups.append(DrawGroup(tuple(rows), max(least, count), any(p.min_p > 0 for p in params)))
    order = plain + bounded + unbounded
    settings = np.empty((6, len(order)))
    settings[0] = order
    settings[1:] = _columns([sequences[i] for i in order])
    return DrawPlan(len(sequences), tuple(groups), settings)


def draw(logits: torch.Tensor, plan: DrawPlan, settings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``[S]`` int64 and whether each row was finite ``[S]`` bool, of logits ``[S, V]``; waits for nothing.

    ``settings`` are those of the plan beside the logits. A row that is not finite gets some token of the vocabulary.
    """
    finite, tokens = _best(logits)
    start = 0
    for group in plan.groups:
        stop = start + len(group.rows)
        rows = settings[0, start:stop].long()
        asked = _Settings.of(settings[1:, start:stop])
        mine = logits if stop - start == plan.num_rows else logits.index_select(0, rows)
        chances = torch.softmax(mine / asked.temperature, dim=-1)
        if group.num_candidates:
            drawn, _ = _draw_filtered(chances, asked, group.num_candidates)
        else:
            drawn = _draw_plain(chances, asked, min_p=group.min_p)
        tokens = tokens.index_copy(0, rows, drawn)
        start = stop
    return tokens.clamp_(0, logits.shape[-1] - 1), finite


def describe(logprobs: torch.Tensor, token_id: int, top: int) -> TokenLogprob:
    """A token's logprob with the ``top`` best beside it, out of ``[V]`` log-probabilities of the untouched logits."""
    values, indices = logprobs.topk(min(top, logprobs.shape[-1]))
    pairs = zip(indices.tolist(), values.tolist(), strict=True)
    return TokenLogprob(token_id, float(logprobs[token_id]), tuple(TopLogprob(i, v) for i, v in pairs))


def _is_adjusted(sequence: Sequence) -> bool:
    return sequence.request.sampling.is_penalized or sequence.num_draws < sequence.request.stop.min_tokens


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1


def _adjust(row: torch.Tensor, sequence: Sequence) -> None:
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
    if sequence.num_draws < stop.min_tokens:
        row[list(sequence.eos_token_ids + stop.stop_token_ids)] = -math.inf


def _best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row of ``[S, V]``: whether it is finite, and its best token, the first of equals."""
    num_rows, vocab = logits.shape
    if vocab % _ARGMAX_BLOCK:
        best, token = logits.max(dim=-1)
        return torch.isfinite(best), token
    blocks = logits.view(num_rows, -1, _ARGMAX_BLOCK)  # five times as fast as one pass: see docs/PERFORMANCE.md
    tops = blocks.amax(-1)
    block = tops.argmax(-1)
    inside = blocks[torch.arange(num_rows, device=logits.device), block].argmax(-1)
    return torch.isfinite(tops.amax(-1)), block * _ARGMAX_BLOCK + inside


def _columns(sequences: Seq[Sequence]) -> np.ndarray:
    """What ``_Settings`` reads, float64 ``[5, R]``."""
    params = [s.request.sampling for s in sequences]
    return np.array(
        [
            [uniform(s.seed, s.num_draws) for s in sequences],
            [max(p.temperature, _COLDEST) for p in params],
            [p.top_k for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
        ]
    )


def _draw_now(logits: torch.Tensor, sequences: Seq[Sequence], filtered: bool) -> list[int]:
    """A draw for each finite row of ``[R, V]``. No row's outcome depends on another's."""
    asked = _Settings.of(torch.from_numpy(_columns(sequences)).to(logits.device))
    chances = torch.softmax(logits / asked.temperature, dim=-1)
    if not filtered:
        least = any(s.request.sampling.min_p > 0 for s in sequences)
        drawn: list[int] = _draw_plain(chances, asked, min_p=least).tolist()
        return drawn
    top_k = max(s.request.sampling.top_k for s in sequences)
    return _draw_from_few(chances, asked, max(_FEW, top_k))


def _draw_from_few(chances: torch.Tensor, asked: _Settings, num_candidates: int) -> list[int]:
    """Draws from each row's best candidates; rows whose nucleus is wider are drawn again from more."""
    vocab = chances.shape[-1]
    drawn, wide = _draw_filtered(chances, asked, num_candidates)
    tokens: list[int] = drawn.tolist()
    again = [i for i, is_wide in enumerate(wide.tolist()) if is_wide] if num_candidates < vocab else []
    if again:
        more = _MANY if num_candidates < _MANY else vocab
        redrawn = _draw_from_few(chances[again], _Settings(*(column[again] for column in asked)), more)
        for i, token in zip(again, redrawn, strict=True):
            tokens[i] = token
    return tokens


def _draw_plain(chances: torch.Tensor, asked: _Settings, *, min_p: bool) -> torch.Tensor:
    """``[R]`` tokens out of ``[R, V]``, by temperature and min-p alone."""
    if min_p:
        least = asked.min_p * chances.amax(-1, keepdim=True)
        chances = torch.where(chances >= least, chances, 0.0)
    return _invert(chances, asked.u)


def _draw_filtered(chances: torch.Tensor, asked: _Settings, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k first, then top-p and min-p of what top-k left: tokens ``[R]``, and where the candidates were too few."""
    vocab = chances.shape[-1]
    count = min(vocab, num_candidates)
    values, indices = chances.topk(count) if count < vocab else chances.sort(dim=-1, descending=True)
    top_k = torch.where(asked.top_k > 0, asked.top_k, vocab)
    weights = torch.where(torch.arange(count, device=chances.device) < top_k, values, 0.0)
    mass = torch.where(top_k < vocab, weights.sum(-1, keepdim=True), 1.0)
    sums = weights.cumsum(-1)
    wide = ((top_k > count) & (sums[:, -1:] < asked.top_p * mass)).squeeze(-1)
    keep = (sums - weights < asked.top_p * mass) & (weights >= asked.min_p * values[:, :1])
    keep[:, 0] = True
    places = _invert(torch.where(keep, weights, 0.0), asked.u)
    return indices.gather(1, places.unsqueeze(1)).squeeze(1), wide


def _invert(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Per row of ``[R, N]``, the index whose share of the cumulative sum holds ``u`` ``[R, 1]`` of the total.

    In two levels, blocks and then one block: only sums of blocks are taken in double precision. Indices are in range
    whatever the weights are, also where they are not finite.
    """
    num_weights = weights.shape[-1]
    if num_weights % _BLOCK:
        weights = functional.pad(weights, (0, -num_weights % _BLOCK))
    blocks = weights.view(weights.shape[0], -1, _BLOCK)
    ends = blocks.sum(-1).double().cumsum(-1)  # [R, N / block]
    target = u * ends[:, -1:]
    block = _first_above(ends, target)
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inner = blocks[torch.arange(len(blocks), device=weights.device), block.squeeze(1)].double().cumsum(-1)
    place = _first_above(inner, (target - start).clamp_(min=0.0))
    return (block * _BLOCK + place).squeeze(1).clamp_(max=num_weights - 1)


def _first_above(ends: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Per row, the first index whose rising ``ends`` pass ``target``; always one where they rise, whatever rounding."""
    last = ends[:, -1:]
    below_all = torch.nextafter(last, torch.zeros_like(last))
    found = torch.searchsorted(ends, torch.minimum(target, below_all), right=True)
    return found.clamp_(max=ends.shape[-1] - 1)
