"""Where an activated LoRA begins, and which of a chunk's rows it is on for."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.variants import calculate_alora_offsets

from loraplex.adapters.facts import AdapterFacts
from loraplex.adapters.registry import AdapterRegistry
from loraplex.engine.invocation import last_place
from loraplex.engine.sequence import Origin, Sequence
from loraplex.engine.uses import Active, Uses, uses_of
from loraplex.types import AdapterRef, Coverage, Request, Residency
from loraplex_kernels.segments import Term
from tests.fakes import FAKE_MODEL

#: few different tokens, so that they repeat
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=24)


@given(TOKENS, st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_the_last_place_is_the_one_that_peft_finds(tokens: list[int], invocation: list[int]) -> None:
    config = {"x": SimpleNamespace(alora_invocation_tokens=invocation)}
    offset = calculate_alora_offsets(config, "x", torch.tensor([tokens]))[0]  # type: ignore[arg-type]
    assert last_place(tokens, invocation) == (None if offset is None else len(tokens) - offset)


def test_long_repetitions_take_linear_time() -> None:
    """Looking at every place would compare 10 ** 9 tokens."""
    tokens = (0,) * 50_000
    assert last_place(tokens, (1, *tokens[:20_000])) is None
    assert last_place((1, *tokens), (1, *tokens[:20_000])) == 0


@given(
    st.lists(st.tuples(st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 20)), max_size=4),
    st.integers(0, 30),
    st.integers(1, 30),
)
def test_runs_are_the_terms_of_each_position(adapters: list[tuple[float, int]], start: int, count: int) -> None:
    active = tuple(Active(f"u{slot}", weight, begun) for slot, (weight, begun) in enumerate(adapters))
    sequence = Sequence(Origin(b"", 1), Request("r", tuple(range(21))), Uses((), active), 0, 0.0)
    sequence.terms = tuple(Term(slot, on.weight) for slot, on in enumerate(active))
    rows = [terms for length, terms in sequence.runs(start, count) for _ in range(length)]
    assert rows == [
        tuple(term for on, term in zip(active, sequence.terms, strict=True) if on.start <= position)
        for position in range(start, start + count)
    ]


def test_only_what_changes_something_is_active() -> None:
    registry = AdapterRegistry(lambda uid: Residency.HOST)
    tokens = {"plain": (), "idle": (), "invoked": (5,), "absent": (5, 7)}
    for name, invocation in tokens.items():
        facts = AdapterFacts(f"u-{name}", "lora", 8, 1, 1, Coverage({}, {}), invocation_tokens=invocation)
        registry.finish_load(registry.begin_load(name, f"/a/{name}"), facts)
    refs = tuple(AdapterRef(name, 0.0 if name == "idle" else 0.5) for name in tokens)
    handles = registry.acquire_all(list(tokens))
    assert handles is not None
    uses = uses_of(Request("r", (4, 5, 6, 5, 6), refs), handles, FAKE_MODEL, registry.knowing)
    assert uses.active == (Active("u-plain", 0.5, 0), Active("u-invoked", 0.5, 3))
    assert [(adapter.name, adapter.invoked) for adapter in uses.resolved] == [
        ("plain", True),
        ("idle", True),
        ("invoked", True),
        ("absent", False),
    ]
