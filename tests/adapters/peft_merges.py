"""Adapters in PEFT and lowered, side by side, to be merged in both; and changes of sites made up for tests of sums."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
from transformers import PreTrainedModel

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta, LowRank, SiteDelta
from loraplex.adapters.merging.merge import Merged, merge
from loraplex.models.sites import Site, SiteKind
from loraplex.types import Coverage, MergeOptions
from tests.adapters.peft_sites import changed_module, load, save_adapter
from tests.fakes_adapters import sites_of, view_of

SEED = 5
#: of a prompt that holds most tokens
ROWS = 40


@dataclass(frozen=True)
class Both:
    """LoRAs by name: in one PEFT model, and lowered for its base."""

    model: PreTrainedModel
    peft_model: peft.PeftModel
    deltas: Mapping[str, AdapterDelta]

    @staticmethod
    def make(model: PreTrainedModel, folder: Path, configs: Mapping[str, peft.LoraConfig]) -> Both:
        """Random adapters of these configs."""
        peft_model: Any = None
        for index, (name, config) in enumerate(configs.items()):
            save_adapter(model, folder / name, config, seed=index + 1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if peft_model is None:
                    loaded = peft.PeftModel.from_pretrained
                    peft_model = loaded(copy.deepcopy(model), folder / name, adapter_name=name)
                else:
                    peft_model.load_adapter(folder / name, adapter_name=name)
        return Both(model, peft_model.eval(), {name: load(folder / name, view_of(model)) for name in configs})

    def ours(self, weights: Mapping[str, float], options: MergeOptions) -> Merged:
        return merge([(self.deltas[name], weight) for name, weight in weights.items()], options, view_of(self.model))

    @contextmanager
    def theirs(self, weights: Mapping[str, float], method: str, **options: Any) -> Iterator[peft.PeftModel]:
        """PEFT's merge of the same, active. ``SEED`` is set when the new adapter has been made, which draws too."""
        lora_model = self.peft_model.base_model
        inject = lora_model.inject_adapter

        def seeded(*args: Any, **kwargs: Any) -> None:
            inject(*args, **kwargs)
            torch.manual_seed(SEED)

        with patch.object(lora_model, "inject_adapter", seeded):
            lora_model.add_weighted_adapter(
                list(weights), list(weights.values()), "merged", combination_type=method, **options
            )
        self.peft_model.set_adapter("merged")
        try:
            yield self.peft_model
        finally:
            self.peft_model.set_adapter(next(iter(weights)))
            self.peft_model.delete_adapter("merged")


def logits(model: torch.nn.Module) -> torch.Tensor:
    token_ids = torch.arange(2 * ROWS).view(2, -1)
    with torch.no_grad():
        rows: torch.Tensor = model(token_ids).logits
    return rows


def changed_model(model: PreTrainedModel, delta: AdapterDelta) -> PreTrainedModel:
    """A copy of ``model`` with all changes in its weights."""
    dense = copy.deepcopy(model)
    kinds = {site.name: site.kind for site in sites_of(model)}
    for name, change in delta.sites.items():
        parent, _, last = name.rpartition(".")
        setattr(dense.get_submodule(parent), last, changed_module(model.get_submodule(name), change, kinds[name]))
    return dense


# ---- made up ----


def view(*shapes: tuple[int, int], dtype: torch.dtype = torch.float32) -> BaseView:
    """A base of linear sites ``s0``, ``s1``, ..., of these shapes ``[out, in]``, whose weights nobody asks for."""

    def nothing(name: str) -> torch.Tensor:
        raise AssertionError(f"a merge asked for the weight of {name}")

    sites = tuple(Site(f"s{index}", SiteKind.LINEAR, inside, out) for index, (out, inside) in enumerate(shapes))
    return BaseView(sites, dtype, weight=nothing, bias=nothing, tied=False, vocab_size=8)


def adapter(base: BaseView, seed: int, rank: int = 4, **facts: Any) -> AdapterDelta:
    """A low-rank change of every site, of falling size by component."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 0.7 ** torch.arange(rank)
    sites = {
        site.name: SiteDelta(
            LowRank(
                torch.randn(rank, site.in_features, generator=generator).to(base.dtype),
                (torch.randn(site.out_features, rank, generator=generator) * sizes).to(base.dtype),
                0.5 + seed,
            )
        )
        for site in base.sites
    }
    return AdapterDelta(**{"uid": f"uid-{seed}", "kind": "lora", "sites": sites, "coverage": Coverage({}, {}), **facts})


def of(sites: Mapping[str, SiteDelta], **facts: Any) -> AdapterDelta:
    """An adapter of these changes."""
    return AdapterDelta(**{"uid": "uid", "kind": "lora", "sites": dict(sites), "coverage": Coverage({}, {}), **facts})


def dense(delta: AdapterDelta, site: str) -> torch.Tensor:
    """A site's low-rank change, float64; 0 where it has none."""
    low_rank = delta.sites[site].low_rank if site in delta.sites else None
    if low_rank is None:
        return torch.zeros((), dtype=torch.float64)
    return low_rank.scale * (low_rank.b.double() @ low_rank.a.double())


def dense_sum(inputs: Sequence[tuple[AdapterDelta, float]], site: str) -> torch.Tensor:
    """The weighted sum of a site's low-rank changes, float64."""
    return torch.stack(torch.broadcast_tensors(*(weight * dense(delta, site) for delta, weight in inputs))).sum(0)
