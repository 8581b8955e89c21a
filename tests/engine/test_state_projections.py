"""LoRAs on the two projections of a state-space layer, also where PEFT puts none: a file in its format, and the other
side is transformers over merged weights (float32). Each stretch of ``in_proj`` is adapted by itself, so that one that
is left out, or is in another's place, is seen."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.engine.local import LocalEngine
from loraplex.types import AdapterRef, Request, StopRule
from tests.engines import local_engine
from tests.fakes_adapters import write_adapter
from tests.kind_matrix import STATE_BASES, Case, clear_case
from tests.oracle import Alone, fresh
from tests.ranks import ranked_engine
from tests.tiny import made_whole, prompt, tiny_checkpoint

MAX_TOKENS = 6
RANK, ALPHA = 3, 6
INNER, HEADS, STATE = 64, 8, 16
STRETCHES = ("z", "x", "B", "C", "dt")
#: adapters: of one stretch of in_proj, of out_proj, and of all of both
NAMES = (*STRETCHES, "out_proj", "both")
#: base, and how many ranks serve it
RUNS = (
    ("mamba2", 1),
    ("mamba2-1-group", 4),
    ("mamba2-8-groups", 2),
    ("bamba", 2),
    ("falcon_h1", 1),
    ("nemotron_h", 4),
    ("granitemoehybrid", 1),
)

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def checkpoint(root: Path, base: str) -> Path:
    arch, overrides = STATE_BASES[base]
    return tiny_checkpoint(root, arch, **{"tie_word_embeddings": False, **overrides})


def rows_of(name: str, width: int) -> slice:
    """Outputs of in_proj that a stretch is; by the sizes of the model, in their documented order."""
    grouped = (width - 2 * INNER - HEADS) // 2
    sizes = dict(zip(STRETCHES, (INNER, INNER, grouped, grouped, HEADS), strict=True))
    start = sum(size for one, size in sizes.items() if STRETCHES.index(one) < STRETCHES.index(name))
    return slice(start, start + sizes[name])


def factors(model: Any, name: str) -> Factors:
    """Random A and B of every projection that the adapter is put on."""
    generator = torch.Generator().manual_seed(NAMES.index(name))
    modules = {"out_proj": ("out_proj",), "both": ("in_proj", "out_proj")}.get(name, ("in_proj",))
    pairs = {}
    for site, module in model.named_modules():
        if not site.endswith(modules):
            continue
        a = torch.randn(RANK, module.in_features, generator=generator)
        b = torch.randn(module.out_features, RANK, generator=generator) * 0.3
        if name in STRETCHES:
            only, rows = torch.zeros_like(b), rows_of(name, module.out_features)
            only[rows] = b[rows]
            b = only
        pairs[site] = (a, b)
    return pairs


def write(out: Path, pairs: Factors) -> None:
    """As PEFT writes a LoRA."""
    targets = sorted({site.rsplit(".", 1)[-1] for site in pairs})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "task_type": "CAUSAL_LM"}
    tensors = {}
    for site, (a, b) in pairs.items():
        tensors |= {f"base_model.model.{site}.lora_A.weight": a, f"base_model.model.{site}.lora_B.weight": b}
    write_adapter(out, config, tensors)


@torch.no_grad()
def merged(base_dir: Path, pairs: Factors) -> Alone:
    model = fresh(base_dir)
    for site, (a, b) in pairs.items():
        model.get_parameter(f"{site}.weight").add_(b @ a, alpha=ALPHA / RANK)
    return Alone(model)


class Bench:
    """One base, and an adapter of every name with what transformers answers to it."""

    def __init__(self, root: Path, base: str) -> None:
        self.base_dir = checkpoint(root, base)
        self.adapters = self.base_dir.with_name(f"{self.base_dir.name}-projections")
        self.oracles = {"": Alone(fresh(self.base_dir))}
        for name in NAMES:
            pairs = factors(fresh(self.base_dir), name)
            assert pairs
            if not (self.adapters / name).exists():
                with made_whole(self.adapters / name) as part:
                    write(part, pairs)
            self.oracles[name] = merged(self.base_dir, pairs)

    def cases(self) -> list[Case]:
        return [
            clear_case(name, oracle, (_request(name, seed) for seed in range(index * 50, index * 50 + 50)))
            for index, (name, oracle) in enumerate(self.oracles.items())
        ]


def _request(name: str, seed: int) -> Request:
    refs = (AdapterRef(name),) if name else ()
    return Request(name, prompt(9, seed=seed), adapters=refs, stop=StopRule(max_tokens=MAX_TOKENS, ignore_eos=True))


@pytest.mark.parametrize(("base", "size"), RUNS, ids=[f"{base}-on-{size}" for base, size in RUNS])
def test_each_stretch_is_served_where_it_is(kinds_root: Path, base: str, size: int) -> None:
    bench = Bench(kinds_root, base)
    cases = bench.cases()
    with ExitStack() as stack:
        engine: LocalEngine
        options: dict[str, object] = {"adapter_dirs": (kinds_root,), "max_num_seqs": 16, "max_num_batched_tokens": 32}
        if size == 1:
            engine = local_engine(bench.base_dir, **options)  # type: ignore[arg-type]
        else:
            engine = stack.enter_context(ranked_engine(bench.base_dir, size, **options)).engine
        for name in NAMES:
            engine.load_adapter(name, str(bench.adapters / name))
        got = engine.generate([case.request for case in cases])
        assert [(g.failure, tuple(g.token_ids)) for g in got] == [(None, case.expected) for case in cases]
    # each of them tells: left out, it would be seen in these very tokens, and served for another in these logits
    for case in cases[1:]:
        assert tuple(bench.oracles[""].greedy(case.request.prompt_token_ids, MAX_TOKENS)) != case.expected, case.name
    rows = torch.stack([oracle.rows(prompt(12, seed=3), 1)[0] for oracle in bench.oracles.values()])
    distances = torch.cdist(rows, rows, p=float("inf")).fill_diagonal_(float("inf"))
    assert distances.min() > 0.05


@pytest.mark.parametrize("base", ["mamba2", "falcon_h1", "nemotron_h"])
def test_peft_around_out_proj_is_what_is_merged(kinds_root: Path, base: str) -> None:
    """So that PEFT may be asked of adapters that it does not make by itself."""
    bench = Bench(kinds_root, base)
    ids = prompt(12, seed=3)
    for name in ("out_proj", "both"):
        ours, theirs = (
            oracle.rows(ids, 3) for oracle in (bench.oracles[name], Alone.of(bench.base_dir, bench.adapters / name))
        )
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-4, atol=1e-4)
