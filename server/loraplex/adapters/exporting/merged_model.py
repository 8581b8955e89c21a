"""What a checkpoint of the base with an adapter folded in is to hold: its sites, tensors and config.json.

Planned before anything is written, so that what no checkpoint of the family can say is refused first: its ends are
untied where the adapter changes one of them alone, and biases that the base does not have are switched on where
config.json has a flag for them. Tensors are made one site at a time. Matrices are written dense, or as ``Requantized``
has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta, SiteDelta
from loraplex.adapters.exporting.merged_site import merged_site
from loraplex.adapters.exporting.requantized import Requantized
from loraplex.adapters.exporting.shards import TensorPlan
from loraplex.errors import UnsupportedFeature
from loraplex.models.sites import Site, SiteKind
from loraplex.quant.written import WriteFormat

#: how the base's weights were stored, and code that read them: neither is so in what is written
_DROPPED: Final = ("quantization_config", "compression_config", "auto_map", "_name_or_path")
#: flags of config.json that give modules biases, of all families
_BIAS_FLAGS: Final = (
    "attention_bias",
    "mlp_bias",
    "use_bias",
    "mamba_proj_bias",
    "projectors_bias",
    "use_conv_bias",
    "mamba_conv_bias",
)

Config = Mapping[str, object]
Describe = Callable[[Config], tuple[Site, ...]]
"""Every adaptable module of the model that a config.json describes."""


@dataclass(frozen=True, slots=True)
class MergedModel:
    """A checkpoint to write. ``sites`` are as it has them, without the head where that is the embedding again;
    ``requantized`` are those whose matrices are not dense."""

    base: BaseView
    deltas: Mapping[str, SiteDelta]
    sites: tuple[Site, ...]
    config: Config
    requantized: Requantized | None = None

    def quantized(self, form: WriteFormat, held: frozenset[str]) -> MergedModel:
        """The same with its matrices in ``form``; ``held`` are the modules that the base has in it.

        Raises InvalidRequest: a matrix has sizes that the form has no blocks for.
        """
        chosen = Requantized(form, self.base.sites, self.base.dtype, held)
        return replace(self, config={**self.config, "quantization_config": chosen.config()}, requantized=chosen)

    def plans(self) -> tuple[TensorPlan, ...]:
        """Its tensors, in checkpoint order."""
        return tuple(plan for site in self.sites for plan in self._plans(site))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The same with their values, one site after the other. Raises InvalidAdapter: values leave the dtype's range;
        InvalidModel: they are not finite, and cannot be quantized; what asking the base raises."""
        for site in self.sites:
            weight, bias = self._values(site)
            if self.requantized is not None and site in self.requantized:
                yield from self.requantized.tensors(site, weight).items()
            else:
                yield site.weight_key, weight
            if site.bias:
                yield f"{site.name}.bias", weight.new_zeros(site.out_features) if bias is None else bias

    def _plans(self, site: Site) -> Iterator[TensorPlan]:
        dense = site.tensors()
        if self.requantized is not None and site in self.requantized:
            del dense[site.weight_key]
            yield from self.requantized.plans(site)
        for key, shape in dense.items():
            yield TensorPlan(key, shape, self.base.dtype)

    def _values(self, site: Site) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias, dtype = self.base.weight(site.name), self.base.bias(site.name), self.base.dtype
        delta = self.deltas.get(site.name)
        if delta is not None:
            return merged_site(site, delta, weight, bias, dtype)
        return weight.to(dtype), None if bias is None else bias.to(dtype)


def plan_merged(delta: AdapterDelta, base: BaseView, config: Config, describe: Describe) -> MergedModel:
    """The checkpoint of ``base``, whose config.json says ``config``, with ``delta`` folded in.

    Raises:
        UnsupportedFeature: it is on from a place of the prompt on, or adds a bias where the family has none.
    """
    if delta.invocation_tokens:
        raise UnsupportedFeature(
            "an activated LoRA changes a prompt from its invocation tokens on, and one model has one set of weights: "
            "it has no MERGED form; export it as PEFT",
            field="format",
        )
    vocab_size = delta.vocab_size or base.vocab_size
    tied = base.tied and _same_ends(delta, base)
    changed = {**_without(config), **_vocabulary(config, vocab_size, tied=tied), **_dtype(config, base.dtype)}
    changed, with_bias = _with_biases(changed, _new_biases(delta, base), base, describe)
    sites = tuple(
        _sized(replace(site, bias=site.name in with_bias), vocab_size)
        for site in base.sites
        if not (tied and site.is_head)
    )
    return MergedModel(base, delta.sites, sites, changed)


def _same_ends(delta: AdapterDelta, base: BaseView) -> bool:
    """Whether embedding and head of a tied base are one matrix still: neither is changed, or both have equal rows and
    nothing else."""
    changes = [delta.sites[site.name] for site in base.ends() if site.name in delta.sites]
    rows = [one.rows for one in changes if one.rows is not None and one.tensors == one.rows.tensors]
    if len(rows) < len(base.ends()):
        return not changes
    first, *others = rows
    return all(_equal(first.values, other.values) and _equal(first.indices, other.indices) for other in others)


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _without(config: Config) -> dict[str, object]:
    return {key: value for key, value in config.items() if key not in _DROPPED}


def _vocabulary(config: Config, vocab_size: int, *, tied: bool) -> dict[str, object]:
    """``config`` of state-spaces' own code says both otherwise, and rounds the size up."""
    if "ssm_cfg" in config:
        return {"vocab_size": vocab_size, "pad_vocab_size_multiple": 1, "tie_embeddings": tied}
    return {"vocab_size": vocab_size, "tie_word_embeddings": tied}


def _dtype(config: Config, dtype: torch.dtype) -> dict[str, object]:
    return {"dtype" if "dtype" in config else "torch_dtype": str(dtype).removeprefix("torch.")}


def _new_biases(delta: AdapterDelta, base: BaseView) -> set[str]:
    """Sites that get a bias and have none."""
    shifted = {name for name, one in delta.sites.items() if one.shift is not None}
    return {site.name for site in base.of(SiteKind.LINEAR) if site.name in shifted and not site.bias}


def _with_biases(
    config: dict[str, object], needed: set[str], base: BaseView, describe: Describe
) -> tuple[dict[str, object], set[str]]:
    """``config`` with the flags on that give the ``needed`` sites biases, and all sites that have one then."""
    having = {site.name for site in base.sites if site.bias}
    for flag in _BIAS_FLAGS:
        missing = needed - having
        if not missing or config.get(flag) is True:
            continue
        switched = {**config, flag: True}
        would = {site.name for site in describe(switched) if site.bias}
        if would & missing and having <= would:
            config, having = switched, would
    if left := sorted(needed - having):
        raise UnsupportedFeature(
            f"the adapter adds a bias at {left[0]!r} ({len(left)} such modules), and config.json of this family "
            f"has no flag for one there: it has no MERGED form; export it as PEFT",
            field="format",
        )
    return config, having


def _sized(site: Site, vocab_size: int) -> Site:
    """An end with as many tokens as the adapter knows."""
    if not site.is_end:
        return site
    is_embedding = site.kind is SiteKind.EMBEDDING
    return replace(site, in_features=vocab_size) if is_embedding else replace(site, out_features=vocab_size)
