"""Plausible mistakes in how adapter kinds are lowered and run, each made once, and in which adapters the matrix sees
it.

Run as a program (``python -m tests.engine.kind_mutations DIR``) it prints a table and ends with 1 when a mistake is not
seen in an adapter that it touches, or is seen in another. Mistakes are made by replacing functions, so nothing else may
run in the process meanwhile.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch

from loraplex.adapters.delta import AdapterDelta, LowRank, SiteDelta
from loraplex.adapters.packed import PackedAdapter, pack_adapter
from loraplex.errors import InvalidAdapter, LoraplexError
from loraplex.layers.rows import Rows
from tests.engines import local_engine
from tests.kind_matrix import Case, KindMatrix
from tests.oracle import fresh
from tests.peft_kinds import INVOCATION

#: a llama with biases, its head apart: where every kind has something to get wrong
ARCH: Final = "llama"
#: of the recipes, those that no other one stands for
NAMES: Final = (
    "lora",
    "lora-ranks",
    "lora-ends",
    "lora-lora-bias",
    "lora-bias-all",
    "lora-bias-only",
    "rslora",
    "dora",
    "dora-ends",
    "bdlora",
    "alora",
    "adalora",
    "vera",
    "loha",
    "lokr",
    "ia3",
    "ia3-up",
    "ln-tuning",
    "trainable-tokens",
    "lora-tokens",
    "lora-saved-norm",
    "lora-saved-head",
    "lora-saved-embedding",
    "lora-saved-linear",
    "lora-added-tokens",
    "pissa-converted",
)

OnSite = Callable[[SiteDelta], SiteDelta]
OnAdapter = Callable[[AdapterDelta], AdapterDelta]


@dataclass(frozen=True, slots=True)
class Report:
    """What became of one mistake: the adapters it touches, and those whose tokens were no longer PEFT's."""

    mistake: str
    touched: frozenset[str]
    red: frozenset[str]

    @property
    def seen(self) -> bool:
        """Whether it is seen in every adapter that it touches, of which there are some, and in no other."""
        return bool(self.touched) and self.red == self.touched


def _sites(change: OnSite) -> OnAdapter:
    """A mistake made at every site."""

    def mutate(delta: AdapterDelta) -> AdapterDelta:
        sites = {name: change(site) for name, site in delta.sites.items()}
        same = all(sites[name] is site for name, site in delta.sites.items())
        # a site that nothing is left of is one that the adapter leaves alone
        return delta if same else replace(delta, sites={n: s for n, s in sites.items() if s.change()})

    return mutate


def _low_rank(change: Callable[[LowRank], LowRank]) -> OnAdapter:
    return _sites(lambda site: site if site.low_rank is None else replace(site, low_rank=change(site.low_rank)))


def _without(part: str) -> OnAdapter:
    return _sites(lambda site: site if getattr(site, part) is None else replace(site, **{part: None}))


def _rows(change: Callable[[Rows], Rows | None]) -> OnAdapter:
    def on_site(site: SiteDelta) -> SiteDelta:
        if site.rows is None or (rows := change(site.rows)) is site.rows:
            return site
        return replace(site, rows=rows)

    return _sites(on_site)


def _next_tokens(rows: Rows) -> Rows:
    """Rows of a few tokens, each for the token behind; the last one keeps its place."""
    if rows.indices is None:
        return rows
    return replace(rows, values=rows.values.roll(1, 0))


def _swapped(one: str, other: str) -> OnAdapter:
    """What is of sites named with ``one`` goes to those named with ``other``, and back."""

    def mutate(delta: AdapterDelta) -> AdapterDelta:
        pairs = {name: name.replace(one, other) for name in delta.sites if one in name}
        pairs = {name: twin for name, twin in pairs.items() if twin in delta.sites}
        swapped = {**pairs, **{twin: name for name, twin in pairs.items()}}
        sites = {name: delta.sites[swapped.get(name, name)] for name in delta.sites}
        return replace(delta, sites=sites) if swapped else delta

    return mutate


def _plain_scale(delta: AdapterDelta) -> AdapterDelta:
    """rsLoRA scaled by alpha / r."""
    if delta.kind != "rslora":
        return delta
    return _low_rank(lambda low_rank: replace(low_rank, scale=low_rank.scale / math.sqrt(low_rank.rank)))(delta)


def _one_scale(delta: AdapterDelta) -> AdapterDelta:
    """Rank and alpha patterns forgotten: the scale of the first site for all."""
    scales = [site.low_rank.scale for site in delta.sites.values() if site.low_rank is not None]
    if len(set(scales)) < 2:
        return delta
    return _low_rank(lambda low_rank: replace(low_rank, scale=scales[0]))(delta)


def _rank_lost(low_rank: LowRank) -> LowRank:
    """The last of the ranks is not there."""
    return replace(low_rank, a=torch.cat((low_rank.a[:-1], torch.zeros_like(low_rank.a[-1:]))))


def _no_bias(base_dir: Path) -> OnAdapter:
    """An output scale that leaves the bias alone where it should scale it, as a DoRA's does."""
    tensors = fresh(base_dir).state_dict()

    def mutate(delta: AdapterDelta) -> AdapterDelta:
        sites = {}
        for name, site in delta.sites.items():
            bias = tensors.get(f"{name}.bias")
            scaled = site.out_scale is not None and site.low_rank is None and bias is not None
            sites[name] = replace(site, shift=(1 - site.out_scale) * bias) if scaled else site  # type: ignore[operator]
        return replace(delta, sites=sites) if any(sites[n] is not s for n, s in delta.sites.items()) else delta

    return mutate


def _mistakes(base_dir: Path) -> dict[str, OnAdapter]:
    """Name -> what it makes of a lowered adapter; it gives back the very adapter where it changes nothing."""
    return {
        "the sign of the scale is flipped": _low_rank(lambda low_rank: replace(low_rank, scale=-low_rank.scale)),
        "rsLoRA is scaled by alpha / r": _plain_scale,
        "rank and alpha patterns are forgotten": _one_scale,
        "the last rank is lost": _low_rank(_rank_lost),
        "the low-rank part is dropped": _without("low_rank"),
        "out_scale is dropped": _without("out_scale"),
        "in_scale is dropped": _without("in_scale"),
        "shift is dropped": _without("shift"),
        "out_scale leaves the bias alone": _no_bias(base_dir),
        "two sites are swapped: k and v": _swapped("k_proj", "v_proj"),
        "two sites are swapped: gate and up": _swapped("gate_proj", "up_proj"),
        "two sites are swapped: layers 0 and 1": _swapped("layers.0.", "layers.1."),
        "two norms are swapped": _swapped("input_layernorm", "post_attention_layernorm"),
        "own rows are dropped": _rows(lambda rows: None),
        "token rows are shifted by one": _rows(_next_tokens),
        "own biases are dropped": _rows(lambda rows: rows if rows.bias is None else replace(rows, bias=-rows.bias)),
        "the head is left as it is": lambda delta: (
            replace(delta, sites={name: site for name, site in delta.sites.items() if name != "lm_head"})
            if "lm_head" in delta.sites
            else delta
        ),
        "an aLoRA is on from the first token": lambda delta: (
            replace(delta, invocation_tokens=()) if delta.invocation_tokens else delta
        ),
        "an aLoRA is on from behind its first invocation token": lambda delta: (
            replace(delta, invocation_tokens=INVOCATION[1:]) if delta.invocation_tokens else delta
        ),
        "an aLoRA is never on": lambda delta: (
            replace(delta, invocation_tokens=(0, 1, 2)) if delta.invocation_tokens else delta
        ),
    }


def _unscaled_factors(delta: SiteDelta) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``SiteDelta.factors`` that forgets the adapter's own output scale."""
    if delta.low_rank is None:
        return None
    return delta.low_rank.a, delta.low_rank.b * delta.low_rank.scale


@contextlib.contextmanager
def _made(mutate: OnAdapter) -> Iterator[list[bool]]:
    """While the block lasts, adapters are packed with a mistake. Gives, for each one loaded, whether it touched it."""
    touched: list[bool] = []

    def pack_with_a_mistake(delta: AdapterDelta, *others: Any, **named: Any) -> PackedAdapter:
        mutated = mutate(delta)
        touched.append(mutated is not delta)
        if not mutated.sites:
            raise InvalidAdapter("the mistake left nothing of it")
        return pack_adapter(mutated, *others, **named)

    with patch("loraplex.engine.ranks.others.pack_adapter", pack_with_a_mistake):
        yield touched


def judge(matrix: KindMatrix, mistake: str, mutate: OnAdapter) -> Report:
    """Serve the matrix, all adapters in one batch, with one mistake in it."""
    cases: list[Case] = [case for name in ("", *NAMES) for case in matrix.cases(name)]
    refused = set()
    with _made(mutate) as touched:
        engine = local_engine(
            matrix.base_dir, adapter_dirs=(matrix.root,), max_num_batched_tokens=64, max_num_seqs=32, kv_page_size=4
        )
        for name in NAMES:
            try:
                engine.load_adapter(name, str(matrix.adapter(name)))
            except LoraplexError:
                refused.add(name)
        cases = [case for case in cases if case.name not in refused]
        got = engine.generate([case.request for case in cases])
    wrong = {c.name or "base" for c, g in zip(cases, got, strict=True) if tuple(g.token_ids) != c.expected}
    return Report(mistake, frozenset(compress(NAMES, touched)), frozenset(wrong | refused))


def reports(root: Path) -> Iterator[Report]:
    """One for no mistake at all, then one for each. Adapters are made below ``root``."""
    matrix = KindMatrix(root, ARCH, tied=False)
    yield judge(matrix, "none", lambda delta: delta)
    for mistake, mutate in _mistakes(matrix.base_dir).items():
        yield judge(matrix, mistake, mutate)
    with patch.object(SiteDelta, "factors", _unscaled_factors):
        scaled = _sites(lambda s: replace(s) if s.low_rank is not None and s.out_scale is not None else s)
        yield judge(matrix, "out_scale leaves the low-rank part alone", scaled)


def main(root: Path) -> int:
    """Print the table; 0 when every mistake was seen where it was made, and nothing without one."""
    unseen = 0
    print(f"{'mistake':55} touches  seen in")
    for report in reports(root):
        right = report.seen if report.mistake != "none" else not report.red
        unseen += not right
        wrong = ", ".join(sorted(report.red ^ report.touched)) or "it touches nothing"
        note = "" if right else f"   <- NOT SEEN WHERE IT IS: {wrong}"
        print(f"{report.mistake:55} {len(report.touched):7}  {len(report.red):7}{note}", flush=True)
    return int(unseen > 0)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    sys.exit(main(Path(sys.argv[1])))
