"""Whether two engines answer alike: the same tokens, or tokens that are nearly as likely."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bench.gpu_check.section import Row
from bench.gpu_check.served import Answer
from loraplex.types import TokenLogprob

#: from the best token to the second, in nats: float32 cannot turn them round, so that equality is no luck
CLEAR_NATS = 1e-3
#: what bfloat16 may make of a logprob. Two CPU ranks beside one, on 32 layers of 512, differ by up to 0.08; where an
#: adapter is lost, other tokens are the best ones
NEAR_NATS = 0.25


class DifferentTokens(Exception):
    """Engines that should answer alike do not."""


class NothingToCompare(Exception):
    """Answers that could not tell right from wrong."""


def clear_ones(answers: Mapping[str, Answer]) -> dict[str, Answer]:
    """Those none of whose tokens hangs on the last bits. Ids are ``ADAPTER-PROMPT``.

    Raises NothingToCompare: too few are, or an adapter answers every prompt as the base does.
    """
    found = {key: answer for key, answer in answers.items() if min(map(_gap, answer.logprobs)) > CLEAR_NATS}
    if 2 * len(found) < len(answers):
        raise NothingToCompare(f"{len(found)} of {len(answers)} answers have clear tokens: less than half")
    for adapter in dict.fromkeys(key.rpartition("-")[0] for key in answers):
        mine = [key for key in answers if key.rpartition("-")[0] == adapter and adapter != "base"]
        same = [key for key in mine if answers[key].token_ids == answers[f"base-{key.rpartition('-')[2]}"].token_ids]
        if mine and same == mine:
            raise NothingToCompare(f"adapter {adapter!r} changes no token: if it were lost, nobody would see")
        if mine and not set(mine) & found.keys():
            raise NothingToCompare(f"adapter {adapter!r} has no answer with clear tokens")
    return found


def compare_tokens(expected: Mapping[str, Answer], found: Mapping[str, Answer]) -> list[str]:
    """What differs, in words, for each answer found that does."""
    return [
        f"{key} answers {list(answer.token_ids)}, must be {list(expected[key].token_ids)}"
        for key, answer in found.items()
        if expected[key].token_ids != answer.token_ids
    ]


def compare_near(expected: Mapping[str, Answer], found: Mapping[str, Answer]) -> Row:
    """What came of comparing logprobs, from each answer's first token to the first that differs: behind that, the two
    answer different questions.

    Raises DifferentTokens: two logprobs of one token are further apart than ``NEAR_NATS``.
    """
    compared, largest, where = 0, 0.0, ""
    for key, answer in expected.items():
        for place, (one, other) in enumerate(_alike(answer, found[key])):
            compared += 1
            difference = max(_difference(one, other), _difference(other, one))
            if difference > largest:
                largest, where = difference, f"token {place} of {key}"
    if largest > NEAR_NATS:
        raise DifferentTokens(f"{where}: its logprobs are {largest:.3g} nats apart, allowed are {NEAR_NATS}")
    same = sum(found[key].token_ids == answer.token_ids for key, answer in expected.items())
    return {
        "answers": len(expected),
        "equal_answers": same,
        "tokens_compared": compared,
        "largest_difference_nats": largest,
    }


def _alike(one: Answer, other: Answer) -> Iterator[tuple[TokenLogprob, TokenLogprob]]:
    """Their tokens, to the first that differs."""
    for mine, its in zip(one.logprobs, other.logprobs, strict=False):
        yield mine, its
        if mine.token_id != its.token_id:
            return


def _difference(one: TokenLogprob, other: TokenLogprob) -> float:
    """Between what both say of the token that ``one`` has; one that ``other`` does not list is less likely than all
    that it lists."""
    listed = {top.token_id: top.logprob for top in other.top} | {other.token_id: other.logprob}
    return abs(one.logprob - listed.get(one.token_id, min(listed.values()) - 2 * NEAR_NATS))


def _gap(token: TokenLogprob) -> float:
    best = sorted((top.logprob for top in token.top), reverse=True)
    return best[0] - best[1]
