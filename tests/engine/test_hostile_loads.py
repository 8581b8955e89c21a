"""PEFT's adapters of every kind, changed in one or two places as a stranger might: each load ends in an error that says
what is wrong, or in an adapter that answers; none in a bug of ours, and the base answers as before."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex.engine.local import Generation, LocalEngine
from loraplex.errors import InvalidAdapter, LoraplexError, Mismatch, OverCapacity, UnsupportedFeature
from loraplex.types import AdapterRef, Request, StopRule
from tests.adapters.peft_sites import files_of
from tests.engines import local_engine
from tests.fakes_adapters import write_adapter
from tests.kind_matrix import KindMatrix
from tests.tiny import prompt

#: what a file may cause, each a status that says who has to mend what
REFUSALS: Final = (InvalidAdapter, Mismatch, UnsupportedFeature, OverCapacity)
NAMES: Final = (
    *("lora", "lora-ranks", "lora-ends", "lora-bias-all", "dora-ends", "bdlora", "alora", "adalora-allocated"),
    *("vera", "vera-regenerated", "loha", "lokr-both", "ia3-up", "ln-tuning", "trainable-tokens", "lora-tokens"),
    *("lora-saved-linear", "lora-saved-twin", "lora-added-vocabulary", "lora-added-tokens", "lora-resized"),
)
VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, 1, -1, 3, 4096, 4097, 1 << 53, 1 << 64, 10**400, -(10**400), 5e-324, 1e308, 0.5),
    *("", "q_proj", ".*", "(", "all-linear", "\ud800", "a\0b", "LORA", "VERA", "IA3", "none", "all"),
    *([], [None], [""], [[[]]], ["q_proj"], ["lm_head", "embed_tokens"], ["norm"], ["layers"], ["mlp"], [1, 1], [95]),
    *([96], [-1], [10**400], list(range(300)), {}, {"": 0}, {"q_proj": 1}, {"q_proj": None}, {"embed_tokens": [0, 1]}),
    {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 1000},
)
NUMBERS: Final = (0.0, 1e-40, 65520.0, 1e20, 3.4e38, float("nan"), float("inf"))
REQUEST: Final = Request("r", prompt(12, seed=3), stop=StopRule(max_tokens=3, ignore_eos=True))

#: of changed adapters; the environment may ask for more, which are others then
EXAMPLES: Final = int(os.environ.get("LORAPLEX_HOSTILE_EXAMPLES", "300"))

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class World:
    """An engine, good adapters by name, and what the base answers."""

    engine: LocalEngine
    good: Mapping[str, tuple[dict[str, Any], Tensors]]
    path: Path
    base: Generation


@pytest.fixture(scope="module")
def world(kinds_root: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    matrix, changed = KindMatrix(kinds_root, "llama", tied=False), tmp_path_factory.mktemp("hostile")
    good = {name: files_of(matrix.adapter(name)) for name in NAMES}
    engine = local_engine(matrix.base_dir, adapter_dirs=(changed,), max_num_seqs=4, kv_page_size=4)
    [base] = engine.generate([REQUEST])
    return World(engine, good, changed / "changed", base)


@st.composite
def changed_config(draw: st.DrawFn, config: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    key = draw(st.sampled_from(sorted(config)) | st.sampled_from(sorted(other)))
    how = draw(st.sampled_from(("value", "value", "other's", "gone", "inside")))
    if how == "gone":
        return {name: value for name, value in config.items() if name != key}
    if how == "other's":
        return {**config, key: other.get(key)}
    value = draw(st.sampled_from(VALUES))
    return {**config, key: {"q_proj": value} if how == "inside" else value}


@st.composite
def changed_tensors(draw: st.DrawFn, tensors: Tensors, other: Tensors) -> Tensors:
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    rest = {key: value for key, value in tensors.items() if key != name}
    how = draw(st.sampled_from(("gone", "renamed", "twice", "swapped", "shape", "dtype", "one value", "all values")))
    if how == "gone":
        return rest
    if how in ("renamed", "twice"):
        new = draw(st.sampled_from(sorted(other)) | st.sampled_from([name + end for end in (".x", ".bias", ".weight")]))
        return {**(rest if how == "renamed" else tensors), new: tensor}
    if how == "swapped":
        twin = draw(st.sampled_from(sorted(tensors)))
        return {**tensors, name: tensors[twin], twin: tensor}
    if how == "shape":
        size = st.sampled_from([*tensor.shape, 0, 1, 3, 4, 96, 101])
        return {**rest, name: torch.ones(draw(st.lists(size, min_size=1, max_size=3)))}
    if how == "dtype":
        return {**rest, name: tensor.to(draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float64))))}
    spoiled = tensor.clone().flatten()
    spoiled[: 1 if how == "one value" else None] = draw(st.sampled_from(NUMBERS))
    return {**rest, name: spoiled.view(tensor.shape)}


@st.composite
def changed(draw: st.DrawFn, good: Mapping[str, tuple[dict[str, Any], Tensors]]) -> tuple[dict[str, Any], Tensors]:
    """A good adapter with one or two changes, some of which bring what another kind has."""
    config, tensors = good[draw(st.sampled_from(NAMES))]
    other_config, other_tensors = good[draw(st.sampled_from(NAMES))]
    for in_config in draw(st.lists(st.booleans(), min_size=1, max_size=2)):
        if in_config:
            config = draw(changed_config(config, other_config))
        elif tensors:
            tensors = draw(changed_tensors(tensors, other_tensors))
    return config, tensors


@pytest.mark.timeout(120)
def test_every_change_is_served_or_refused_by_name(world: World) -> None:
    outcomes: set[str] = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=2000,
        suppress_health_check=list(HealthCheck),
        derandomize=EXAMPLES == 300,
        database=None,
    )
    @given(changed(world.good))
    def check(files: tuple[dict[str, Any], Tensors]) -> None:
        outcomes.add(load_and_ask(world, *files))

    check()
    assert outcomes >= {"served", "InvalidAdapter", "Mismatch", "UnsupportedFeature"}
    [base] = world.engine.generate([REQUEST])
    assert base.token_ids == world.base.token_ids
    assert world.engine.list_adapters() == ()


def load_and_ask(world: World, config: dict[str, Any], tensors: Tensors) -> str:
    """What came of it. Fails for what should never come of it."""
    engine = world.engine
    write_adapter(world.path, config, tensors)
    refusal = None
    try:
        info = engine.load_adapter("x", str(world.path))
    except LoraplexError as error:
        refusal = error
    if refusal is not None:
        assert type(refusal) in REFUSALS, refusal
        assert 20 < len(str(refusal).encode()) < 2000
        return type(refusal).__name__
    request = Request("x", REQUEST.prompt_token_ids, adapters=(AdapterRef("x"),), stop=REQUEST.stop)
    [got] = engine.generate([request])
    engine.unload_adapter("x")
    # large weights may turn another prompt than the probe's non-finite: that request fails, and says so
    assert got.failure is None or got.failure.error == "NonFinite"
    assert info.probe is not None
    assert info.probe.max_change > 0 or info.vocab_size
    return "served"
