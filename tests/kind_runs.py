"""A whole kind matrix through an engine, in one batch."""

from __future__ import annotations

import random

from loraplex.engine.local import LocalEngine
from loraplex.types import FinishReason
from tests.engines import in_random_arrival
from tests.kind_matrix import KindMatrix


def serve_all(engine: LocalEngine, matrix: KindMatrix, *, preempted: bool, at_once: int = 8) -> None:
    """Every adapter and the base, each prompt twice, arriving at random: each sequence's tokens are those that PEFT
    gives it alone, and what the run is meant to exercise does happen: some are preempted, ``at_once`` adapters are in
    a step."""
    cases = [*matrix.all_cases(), *matrix.all_cases()]  # each prompt twice, for the prefix cache
    rng = random.Random(7)
    rng.shuffle(cases)
    got = in_random_arrival(engine, [case.request for case in cases], rng, most=1)
    wrong = {
        case.request.request_id: (generation.failure, generation.token_ids, case.expected)
        for case, generation in zip(cases, got, strict=True)
        if tuple(generation.token_ids) != case.expected
    }
    assert not wrong
    assert all(g.finish is FinishReason.LENGTH and g.num_endings == 1 for g in got)
    # what the run was meant to exercise did happen
    assert (engine.reports[-1].preemptions > 0) is preempted
    assert sum(g.usage.cached_prompt_tokens for g in got) > 0
    assert max(report.adapters for report in engine.reports) >= at_once
    assert any(report.prefill_tokens and report.decode_tokens for report in engine.reports)
    assert engine.core.num_sequences == 0
    assert engine.reports[-1].kv_pages_used == 0
    assert engine.reports[-1].state_slots_used == 0
