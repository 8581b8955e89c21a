"""AdaLoRA: ``alpha / r0 * B (E o A)``, singular values E apart, with a rank of its own for each layer.

r0 is the rank that training began with (``init_r``), whatever became of it: ``rank_pattern`` says which of its r0
directions a layer kept, and only those are saved. A layer that kept none is not changed.

Sources: arXiv:2303.10512; peft 0.21 tuners/adalora/layer.py ``SVDLinear.forward`` and tuners/adalora/model.py
``resize_modules_by_rank_pattern`` (the scale stays that of ``init_r``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import SiteDelta
from loraplex.adapters.kinds.base import Lowered
from loraplex.adapters.reading.adapter_files import AdapterFiles
from loraplex.adapters.reading.biases import SavedBiases
from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.keys import (
    COMMON_KEYS,
    MAX_PATTERNS,
    ConfigReader,
    KeyRules,
    anything,
    harmless,
    is_bool,
    is_bool_or_text,
    is_list,
    is_list_or_object,
    is_number,
    is_object,
    is_text,
    refused,
    served,
)
from loraplex.adapters.reading.phrases import shown
from loraplex.adapters.reading.site_tensors import SiteTensors, take_site_tensors, targeted_linears
from loraplex.adapters.reading.targets import Targets
from loraplex.errors import InvalidAdapter, Mismatch

_PARTS: Final = ("lora_A", "lora_B", "lora_E")
#: what PEFT adds to a rank before it divides by it
_EPSILON: Final = 1e-5
#: of peft 0.21's AdaLoraConfig (tuners/adalora/config.py), which has all keys of LoRA's but looks at few
ADALORA_KEYS: Final[KeyRules] = MappingProxyType(
    {
        **COMMON_KEYS,
        "init_r": served(),
        "lora_alpha": served(),
        "rank_pattern": served(is_object),
        "target_modules": served(),
        "exclude_modules": served(),
        "layers_to_transform": served(),
        "layers_pattern": served(),
        "bias": served(),
        "modules_to_save": served(),
        "trainable_token_indices": served(is_list_or_object),
        # of the training alone
        "target_r": harmless(is_number),
        "tinit": harmless(is_number),
        "tfinal": harmless(is_number),
        "deltaT": harmless(is_number),
        "beta1": harmless(is_number),
        "beta2": harmless(is_number),
        "orth_reg_weight": harmless(is_number),
        "total_step": harmless(anything),
        "lora_dropout": harmless(is_number),
        # of LoRA, and not looked at for AdaLoRA, whatever they say
        "r": harmless(is_number),
        "alpha_pattern": harmless(is_object),
        "use_rslora": harmless(is_bool),
        "lora_bias": harmless(is_bool),
        "init_lora_weights": harmless(is_bool_or_text),
        "fan_in_fan_out": harmless(is_bool),
        "runtime_config": harmless(is_object),
        "megatron_core": harmless(is_text),
        "eva_config": harmless(is_object),
        "corda_config": harmless(is_object),
        "lora_ga_config": harmless(is_object),
        "qalora_group_size": harmless(is_number),
        # what AdaLoRA cannot be combined with
        "use_dora": refused(is_bool, False),
        "loftq_config": refused(is_object, None, {}),
        "use_qalora": refused(is_bool, False),
        "ensure_weight_tying": refused(is_bool, False),
        "alora_invocation_tokens": refused(is_list, None, []),
        "layer_replication": refused(is_list, None, []),
        "target_parameters": refused(is_list, None, []),
        "megatron_config": refused(is_object, None),
        "velora_config": refused(is_object, None),
        "monteclora_config": refused(is_object, None),
        "use_bdlora": refused(is_object, None),
        "arrow_config": refused(is_object, None),
        "kasa_config": refused(is_object, None),
    }
)


class AdaloraKind:
    """``lora_A`` ``[k, in]``, ``lora_E`` ``[k, 1]``, ``lora_B`` ``[out, k]``; k directions of a layer were kept."""

    name: Final = "adalora"
    keys: Final = ADALORA_KEYS

    def matches(self, config: AdapterConfig) -> bool:
        return config.peft_type == "ADALORA"

    def lower(self, files: AdapterFiles, base: BaseView) -> Lowered:
        """See ``AdapterKind.lower``."""
        reader = ConfigReader(files.config)
        rule = reader.target_rule()
        targets = Targets(rule)
        found = take_site_tensors(files.tensors, targeted_linears(rule, targets, base), _PARTS)
        initial, alpha = reader.rank("init_r", 12), reader.number("lora_alpha", 8)
        kept = _kept(reader, initial)
        strange = sorted(set(kept) - set(found))
        if strange:
            raise Mismatch(
                f"{files.config.where}: rank_pattern names {strange[0]!r}, which is no targeted site",
                field="rank_pattern",
            )
        biases = SavedBiases.of(files.config, "lora_only").take(files.tensors, base, found, targets.is_saved)
        sites: dict[str, SiteDelta] = {}
        for name, tensors in found.items():
            rank = kept.get(name, initial)
            scale = (alpha if alpha > 0 else float(rank)) / float(torch.tensor(float(initial)) + _EPSILON)
            sites[name] = _delta(tensors, rank, scale, biases.shifts.get(name), base)
        return Lowered({name: delta for name, delta in biases.beside(sites).items() if delta.change()})


def _delta(tensors: SiteTensors, rank: int, scale: float, shift: torch.Tensor | None, base: BaseView) -> SiteDelta:
    site = tensors.site
    a = tensors.take("lora_A", (rank, site.in_features), of_config=(0,))
    e = tensors.take("lora_E", (rank, 1), of_config=(0,))
    b = tensors.take("lora_B", (site.out_features, rank), of_config=(1,))
    return SiteDelta(tensors.low_rank(a * e, b, scale, base.dtype) if rank else None, shift=shift)


def _kept(reader: ConfigReader, initial: int) -> Mapping[str, int]:
    """Site -> how many directions it kept, of ``rank_pattern``: ``{"<site>.lora_E": [true, false, ...]}``.

    Raises InvalidAdapter: another name, or not one flag for each of the ``initial`` directions.
    """
    patterns = reader.config.values.get("rank_pattern")
    if not isinstance(patterns, dict):
        return {}
    kept: dict[str, int] = {}
    for name, flags in patterns.items():
        # PEFT drops the adapter's own name behind it when it saves, and takes it as well
        site, _, rest = name.rpartition(".lora_E")
        key = f"rank_pattern[{name[:100]!r}]"
        if not site or rest.count(".") != (1 if rest else 0) or len(patterns) > MAX_PATTERNS:
            raise InvalidAdapter(
                f"{reader.config.where}: {key}: expected at most {MAX_PATTERNS} names such as "
                f"model.layers.0.self_attn.q_proj.lora_E",
                field="rank_pattern",
            )
        if type(flags) is not list or len(flags) != initial or not all(type(flag) is bool for flag in flags):
            raise reader.wrong(key, shown(flags), f"a list of {initial} flags, one for each direction of init_r")
        kept[site] = sum(flags)
    return kept
