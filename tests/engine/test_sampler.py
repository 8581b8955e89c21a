"""Draws: the right distribution, one seed one outcome, and no row's outcome depends on its neighbours."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch.nn import functional
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loraplex.engine.sampler import draw as draw_ahead
from loraplex.engine.sampler import plan_draws, sample, uniform
from loraplex.engine.sequence import Origin, Sequence
from loraplex.engine.uses import Uses
from loraplex.types import OutputOptions, Request, SamplingParams, StopRule

VOCAB = 3000


def sequence(
    seed: int = 1,
    *,
    outputs: tuple[int, ...] = (),
    stop: StopRule | None = None,
    logprobs: int = 0,
    vocab: int = 0,
    **params: float,
) -> Sequence:
    request = Request(
        "r",
        (5, 6, 7),
        sampling=SamplingParams(**params),  # type: ignore[arg-type]
        stop=stop or StopRule(),
        output=OutputOptions(logprobs=logprobs),
    )
    made = Sequence(Origin(b"", 1), request, Uses(vocab_size=vocab, eos_token_ids=(2,)), seed, 0.0)
    made.num_unknown = len(outputs)
    for token in outputs:
        made.append(token)
    return made


def logits(rows: int = 1, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def draw(row: torch.Tensor, asked: Sequence) -> int:
    return sample(row.clone().view(1, -1), [asked])[0].token_id


CASES = [
    {"temperature": 1.0},
    {"temperature": 0.6, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 5.0, "top_p": 0.99},  # the nucleus is wider than the candidates looked at first
    {"temperature": 0.7, "repetition_penalty": 1.4},
]


def allowed_by_transformers(row: torch.Tensor, params: dict[str, float], seen: list[int]) -> torch.Tensor:
    """The distribution ``[V]`` that transformers' own warpers leave."""
    warpers = LogitsProcessorList()
    if "repetition_penalty" in params:
        warpers.append(RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    warpers.append(TemperatureLogitsWarper(float(params["temperature"])))
    if "top_k" in params:
        warpers.append(TopKLogitsWarper(int(params["top_k"])))
    if "top_p" in params:
        warpers.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        warpers.append(MinPLogitsWarper(params["min_p"]))
    return warpers(torch.tensor([seen]), row.clone().view(1, -1)).softmax(-1)[0]


@pytest.mark.parametrize("params", CASES, ids=str)
def test_frequencies_are_those_of_transformers_warpers(params: dict[str, float]) -> None:
    row = logits(scale=2.0)[0]
    expected = allowed_by_transformers(row, params, [5, 6, 7])
    count = 4000
    rows = row.expand(count, -1).clone()
    drawn = [d.token_id for d in sample(rows, [sequence(seed, **params) for seed in range(count)])]
    assert min(expected[token] for token in drawn) > 0
    seen = Counter(drawn)
    for token in expected.topk(5).indices.tolist():
        share, wanted = seen[token] / count, float(expected[token])
        assert abs(share - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / count) + 1e-3


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch() -> None:
    rows = logits(8, seed=3)
    asked = [sequence(seed, **CASES[seed % len(CASES)]) for seed in range(8)]
    together = [d.token_id for d in sample(rows.clone(), asked)]
    assert together == [draw(rows[i], asked[i]) for i in range(8)]
    order = [5, 2, 7, 0]
    shuffled = sample(rows[order].clone(), [asked[i] for i in order])
    assert [d.token_id for d in shuffled] == [together[i] for i in order]


def test_seeds_and_positions_differ() -> None:
    row = logits(scale=0.1)[0]
    assert len({draw(row, sequence(seed, temperature=1.0)) for seed in range(50)}) > 40
    assert len({draw(row, sequence(1, outputs=(9,) * n, temperature=1.0)) for n in range(50)}) > 40


def test_uniform_is_uniform() -> None:
    values = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert all(0 <= v < 1 for v in values)
    assert abs(sum(values) / len(values) - 0.5) < 0.01
    assert all(950 * 0.8 < sum(1 for v in values if k / 10 <= v < (k + 1) / 10) < 1050 * 1.2 for k in range(10))


def test_greedy_ignores_seed_and_takes_the_best() -> None:
    rows = logits(3)
    assert [d.token_id for d in sample(rows.clone(), [sequence(s) for s in range(3)])] == rows.argmax(-1).tolist()


def test_presence_and_frequency_count_outputs_only() -> None:
    row = torch.zeros(VOCAB)
    row[5], row[8], row[9] = 3.0, 2.9, 2.8  # 5 stands in the prompt, 8 was put out twice
    assert draw(row, sequence(outputs=(8, 8), presence_penalty=0.2, frequency_penalty=0.2)) == 5
    row[5] = 0
    assert draw(row, sequence(outputs=(8, 8), presence_penalty=0.0, frequency_penalty=0.04)) == 8
    assert draw(row, sequence(outputs=(8, 8), presence_penalty=0.0, frequency_penalty=0.06)) == 9


def test_no_end_before_min_tokens() -> None:
    row = torch.zeros(VOCAB)
    row[2], row[7], row[9] = 9.0, 8.0, 7.0
    stop = StopRule(min_tokens=2, stop_token_ids=(7,))
    assert draw(row, sequence(outputs=(1,), stop=stop)) == 9
    assert draw(row, sequence(outputs=(1, 1), stop=stop)) == 2


def test_rows_that_are_not_finite_fail_alone() -> None:
    rows = logits(5)
    expected = rows.argmax(-1).tolist()
    rows[1, 7], rows[3, 0] = math.nan, math.inf
    rows[2] = -math.inf
    got = [d.token_id for d in sample(rows, [sequence() for _ in range(5)])]
    assert got == [expected[0], -1, -1, -1, expected[4]]


def test_logprobs_are_of_the_untouched_logits() -> None:
    rows = logits(2)
    asked = [sequence(temperature=0.5, repetition_penalty=2.0, logprobs=3), sequence()]
    plain = rows[0].log_softmax(-1)
    drawn = sample(rows.clone(), asked)
    assert drawn[1].logprob is None
    entry = drawn[0].logprob
    assert entry is not None
    assert entry.token_id == drawn[0].token_id
    assert entry.logprob == pytest.approx(float(plain[entry.token_id]))
    assert [t.token_id for t in entry.top] == plain.topk(3).indices.tolist()


WIDER = 200


@pytest.mark.parametrize("past", [-math.inf, 50.0, math.nan])
@pytest.mark.parametrize("vocab", [VOCAB, 3072])
def test_neighbours_with_larger_vocabularies_change_nothing(vocab: int, past: float) -> None:
    """Greedy, drawn in every way, penalized and explained: a row gets what it gets alone, in logits of its own width.

    What lies past it is -inf, and would not even be looked at if it were not. 3072 is a vocabulary whose greedy token
    is found in blocks, and a wider one's is not.
    """
    widths = [vocab, vocab + WIDER, vocab + 7, vocab]
    kinds = [*CASES, {}, {"presence_penalty": 0.5}]
    asked, rows = [], []
    for index in range(4 * len(kinds)):
        width = widths[index % 4]
        params = kinds[index // 4]
        asked.append(sequence(index, outputs=(9, width - 1), logprobs=index % 3, vocab=width, **params))
        rows.append(torch.randn(width, generator=torch.Generator().manual_seed(index)) * 3)
    alone = [sample(row.clone().view(1, -1), [one])[0] for row, one in zip(rows, asked, strict=True)]
    together = torch.stack([functional.pad(row, (0, vocab + WIDER - len(row)), value=past) for row in rows])
    assert sample(together, asked) == alone
    assert any(drawn.token_id >= vocab for drawn in alone)
    assert all(drawn.token_id < len(row) for drawn, row in zip(alone, rows, strict=True))


def test_a_row_that_is_not_finite_fails_alone_beside_a_larger_vocabulary() -> None:
    rows = functional.pad(logits(3), (0, WIDER), value=-math.inf)
    rows[1] = math.nan
    rows[2, VOCAB:] = 50.0
    got = sample(rows.clone(), [sequence(vocab=VOCAB), sequence(vocab=VOCAB), sequence(vocab=VOCAB + WIDER)])
    assert [d.token_id for d in got] == [int(rows[0].argmax()), -1, VOCAB]


#: what can be drawn without waiting: every combination of the filters, narrow and wide
AHEAD = [
    {},
    *(params for params in CASES if "repetition_penalty" not in params),
    {"temperature": 1.0, "top_k": 2000, "top_p": 0.999},
    {"temperature": 0.9, "top_k": 1, "min_p": 0.5},
    {"temperature": 30.0, "top_p": 0.95, "min_p": 0.2},
    {"temperature": 1e-45},
]


def ahead(rows: torch.Tensor, asked: list[Sequence]) -> tuple[list[int], list[bool]]:
    plan = plan_draws(asked, rows.shape[-1])
    tokens, finite = draw_ahead(rows, plan, torch.from_numpy(plan.settings))
    return tokens.tolist(), finite.tolist()


@pytest.mark.parametrize("vocab", [VOCAB, 3072, 50])
@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_drawing_ahead_gives_the_same_tokens(vocab: int, scale: float) -> None:
    rows = torch.randn(240, vocab, generator=torch.Generator().manual_seed(vocab)) * scale
    asked = [sequence(seed, outputs=(9,) * (seed % 4), **AHEAD[seed % len(AHEAD)]) for seed in range(240)]
    assert not any(one.needs_host for one in asked)
    expected = [d.token_id for d in sample(rows.clone(), asked)]
    assert ahead(rows.clone(), asked) == (expected, [True] * 240)
    for params in AHEAD:  # a batch of one kind takes another path than a mixed one
        alike = [sequence(seed, **params) for seed in range(60)]
        expected = [d.token_id for d in sample(rows[:60].clone(), alike)]
        assert ahead(rows[:60].clone(), alike)[0] == expected


def test_drawing_ahead_gives_a_token_of_the_vocabulary_whatever_the_logits_are() -> None:
    """Nobody has looked at the row when the next step looks its token up."""
    rows = logits(len(AHEAD) * 4)
    rows[0::4] = math.nan
    rows[1::4, 7] = math.inf
    rows[2::4] = -math.inf
    asked = [sequence(seed, **AHEAD[seed // 4]) for seed in range(len(AHEAD) * 4)]
    expected = [d.token_id for d in sample(rows.clone(), asked)]
    tokens, finite = ahead(rows.clone(), asked)
    assert all(0 <= token < VOCAB for token in tokens)
    assert finite == [False, False, False, True] * len(AHEAD)
    assert tokens[3::4] == expected[3::4]
    for params in AHEAD:
        tokens, _ = ahead(rows.clone(), [sequence(seed, **params) for seed in range(len(rows))])
        assert all(0 <= token < VOCAB for token in tokens)


def test_what_needs_the_host_says_so() -> None:
    assert not sequence(temperature=0.8, top_k=5, top_p=0.9, min_p=0.1).needs_host
    for params in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}):
        assert sequence(**params).needs_host
    assert sequence(logprobs=1).needs_host
    early = StopRule(min_tokens=2)
    assert sequence(outputs=(1,), stop=early).needs_host
    assert not sequence(outputs=(1, 1), stop=early).needs_host


def test_nothing_that_draws_ahead_looks_at_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that would wait for it."""

    def refuse(*_: object) -> None:
        raise AssertionError("a value was looked at")

    rows = logits(len(AHEAD))
    asked = [sequence(seed, **params) for seed, params in enumerate(AHEAD)]
    plan = plan_draws(asked, VOCAB)
    settings = torch.from_numpy(plan.settings)
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    tokens, finite = draw_ahead(rows, plan, settings)
    assert tokens.shape == finite.shape == (len(AHEAD),)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_drawing_ahead_does_not_wait_for_the_device() -> None:
    rows = logits(len(AHEAD))
    asked = [sequence(seed, **params) for seed, params in enumerate(AHEAD)]
    expected = [d.token_id for d in sample(rows.clone(), asked)]
    plan = plan_draws(asked, VOCAB)
    settings, on_device = torch.from_numpy(plan.settings).cuda(), rows.cuda()
    draw_ahead(on_device, plan, settings)  # loads kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens, finite = draw_ahead(on_device, plan, settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert finite.all()
    assert tokens.tolist() == expected


def test_tiny_temperature_is_greedy() -> None:
    row = logits()[0]
    assert draw(row, sequence(temperature=1e-45)) == int(row.argmax())
