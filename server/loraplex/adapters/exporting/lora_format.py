"""An adapter that no directory holds, as a LoRA that PEFT loads on the same base and that answers alike.

Scales are in the factors, rounded as the kernels take them; each module has its own rank. A shift is ``lora_bias``, own
rows are a saved module. What plain LoRA cannot say is refused with the reason.

Source: peft 0.21 LoraConfig, ``get_pattern_key`` and ``set_peft_model_state_dict``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import AdapterDelta, SiteDelta
from loraplex.adapters.saved.own_rows import laid_over
from loraplex.errors import UnsupportedFeature
from loraplex.models.sites import Site, SiteKind

_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class LoraFiles:
    """What its two files say: adapter_config.json, and the tensors by name."""

    config: Mapping[str, object]
    tensors: Mapping[str, torch.Tensor]


def as_lora(delta: AdapterDelta, base: BaseView) -> LoraFiles:
    """``delta`` as a LoRA of ``base``.

    Raises:
        UnsupportedFeature: it changes something that a LoRA cannot, named by module.
    """
    if delta.vocab_size:
        raise _refusal(f"adds tokens ({delta.vocab_size}, the base has {base.vocab_size})", "a base that was resized")
    if delta.invocation_tokens:
        raise _refusal("is on from its invocation tokens on", "an activated LoRA")
    sites = base.by_name()
    low = {name: one for name, one in delta.sites.items() if one.rows is None}
    saved = {name: one for name, one in delta.sites.items() if one.rows is not None}
    if not low:
        raise _refusal("changes nothing by factors", "one module with a LoRA at least")
    with_bias = any(one.shift is not None for one in low.values())
    tensors: dict[str, torch.Tensor] = {}
    for name, one in low.items():
        tensors.update(_factors(sites[name], one, with_bias, base.dtype))
    for name, one in saved.items():
        tensors.update(_saved(sites[name], one, base))
    return LoraFiles(_config({name: max(one.rank, 1) for name, one in low.items()}, list(saved), with_bias), tensors)


def _config(ranks: Mapping[str, int], saved: list[str], with_bias: bool) -> dict[str, object]:
    """Every module by its whole name, so that none is met by chance; alpha is the rank, for a scale of one."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "modules_to_save": saved or None,
        "lora_bias": with_bias,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _factors(site: Site, delta: SiteDelta, with_bias: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if delta.out_scale is not None or delta.in_scale is not None:
        raise _refusal(f"scales what the base gives at {site.name!r}", "changes that are sums")
    name = _PREFIX + site.name
    factors = delta.factors()
    a, b = factors or (torch.zeros(1, site.in_features, dtype=dtype), torch.zeros(site.out_features, 1, dtype=dtype))
    if site.kind is SiteKind.EMBEDDING:
        if with_bias:
            raise _refusal(f"changes the embedding {site.name!r} and adds biases", "one of the two")
        return {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
    found = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    if with_bias:
        shift = torch.zeros(site.out_features) if delta.shift is None else delta.shift
        found[f"{name}.lora_B.bias"] = shift.to(dtype)
    return found


def _saved(site: Site, delta: SiteDelta, base: BaseView) -> dict[str, torch.Tensor]:
    """The whole of a module of which some rows are the adapter's own."""
    rows = delta.rows
    assert rows is not None
    if len(delta.tensors) > len(rows.tensors):
        raise _refusal(f"has own rows at {site.name!r} and {delta.change()}", "one of the two at a module")
    if site.kind is SiteKind.VECTOR:
        raise _refusal(f"has its own {site.name!r}", "modules, and that is a parameter of one")
    name, weight = _PREFIX + site.name, base.weight(site.name)
    values = rows.values.reshape(weight.shape) if rows.indices is None else laid_over(weight, rows, len(weight))
    found = {f"{name}.weight": values.to(base.dtype)}
    bias = base.bias(site.name)
    if bias is not None:
        bias = bias.clone()
        if rows.bias is not None:
            bias[slice(None) if rows.indices is None else rows.indices] = rows.bias.to(bias.dtype)
        found[f"{name}.bias"] = bias.to(base.dtype)
    return found


def _refusal(what: str, allowed: str) -> UnsupportedFeature:
    return UnsupportedFeature(
        f"the adapter {what}, which a LoRA of PEFT cannot say (it can say {allowed}): it has no PEFT form; export it "
        f"as MERGED",
        field="format",
    )
