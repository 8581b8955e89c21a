"""Adapters on quantized state-space and hybrid models, in one batch with the base alone, on one rank and on two: each
sequence's greedy tokens are those that PEFT gives it on a dense model of the same weights (float32)."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from loraplex.engine.local import LocalEngine
from loraplex.models.base import BaseModel
from loraplex.models.decoder import Decoder
from loraplex.models.mixers.base import HeldLinear
from tests.engines import local_engine
from tests.kind_runs import serve_all
from tests.quant.cases import CASES
from tests.quant.kinds import state_kinds_on
from tests.ranks import ranked_engine

#: of what is done with a weight: products, norms of its rows, a change of all of it, scales, biases
RECIPES = ("lora", "dora", "bdlora", "ia3-up", "lora-bias-all", "lora-saved-mixer")
#: base, a name of ``CASES``, ranks
RUNS = (
    ("mamba2", "nf4", 2),
    ("mamba2", "gptq-4bit-g32-desc_act", 1),
    ("bamba", "gptq-8bit-g64-asym", 2),
    ("bamba", "nf4-at-load", 1),
)


@pytest.mark.parametrize(("base", "name", "size"), RUNS, ids=[f"{base}-{name}-on-{size}" for base, name, size in RUNS])
def test_kinds_in_one_batch(tmp_path: Path, base: str, name: str, size: int) -> None:
    matrix = state_kinds_on(tmp_path, base, name, RECIPES)
    assert set(matrix.names) == set(RECIPES)
    options: dict[str, object] = {
        "adapter_dirs": (matrix.root,),
        "quantization": CASES[name].quantization,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 24,
        "kv_page_size": 4,
    }
    with ExitStack() as stack:
        engine: LocalEngine
        if size == 1:
            engine = local_engine(matrix.base_dir, **options)  # type: ignore[arg-type]
            models = [engine.core._steps.executor.runner.model]
        else:
            ranked = stack.enter_context(ranked_engine(matrix.base_dir, size, **options))
            engine, models = ranked.engine, [runner.model for runner in ranked.runners]
        for model in models:
            assert _bits(model) < 11, "not all projections are quantized"
        for recipe in matrix.names:
            engine.load_adapter(recipe, str(matrix.adapter(recipe)))
        serve_all(engine, matrix, preempted=False, at_once=5)


def _bits(model: BaseModel) -> float:
    """The most that a weight of a linear module takes, scales included."""
    assert isinstance(model, Decoder)
    held = [one for layer in model._parts.layers for block in layer.blocks for one in block.held]
    weights = [one.linear.weight for one in held if isinstance(one, HeldLinear)]
    return max(weight.nbytes * 8 / (weight.shape[0] * weight.shape[1]) for weight in weights)
