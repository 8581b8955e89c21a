"""What a LoRA config says of every module: which are adapted, with what rank, scale and biases.

Source: peft 0.21 tuners/lora/layer.py ``update_layer`` (scaling, variants), tuners/lora/model.py
``_add_targets_to_tie`` and tuners/tuners_utils.py ``_check_tied_modules`` (tied heads).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.reading.biases import SavedBiases
from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.keys import ConfigReader
from loraplex.adapters.reading.ranked_targets import RankedTargets
from loraplex.adapters.reading.site_tensors import refuse_convolutions
from loraplex.errors import UnsupportedFeature
from loraplex.models.sites import ENDS, SiteKind


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """A config of the LoRA family, read. ``lora_bias``: every linear site's B has a bias."""

    modules: RankedTargets
    use_rslora: bool
    lora_bias: bool
    biases: SavedBiases
    tie: bool

    @staticmethod
    def of(config: AdapterConfig) -> LoraPlan:
        """Raises InvalidAdapter, and UnsupportedFeature for variants that PEFT does not combine."""
        _check_combination(config)
        found = ConfigReader(config)
        return LoraPlan(
            modules=RankedTargets.of(config, "lora_alpha"),
            use_rslora=found.flag("use_rslora"),
            lora_bias=found.flag("lora_bias"),
            biases=SavedBiases.of(config, "lora_only"),
            tie=found.flag("ensure_weight_tying"),
        )

    def select(self, base: BaseView) -> set[str]:
        """Names of the sites that are adapted. Raises UnsupportedFeature: a convolution is."""
        refuse_convolutions(self.modules.rule, self.modules.targets, base)
        tied = self.tied_head(base)
        return self.modules.targets.select(base.of(SiteKind.LINEAR, SiteKind.EMBEDDING)) | {*tied, *tied.values()}

    def tied_head(self, base: BaseView) -> dict[str, str]:
        """The head's name -> that of the embedding whose factors it has, turned around; empty where they are not tied.

        Targeting either end ties both, where the base's are tied and the config asks for it. PEFT drops the head's name
        from the target_modules that it saves, and adds the embedding's.
        """
        names_an_end = any(self.modules.targets.names_module(end) for end in ENDS)
        if not (self.tie and base.tied and names_an_end) or any(self.modules.targets.saves_module(end) for end in ENDS):
            return {}
        ends = {site.kind: site.name for site in base.ends()}
        return {ends[SiteKind.LINEAR]: ends[SiteKind.EMBEDDING]}

    def scale(self, site: str) -> float:
        """Of a site's product: ``alpha / r``, or ``alpha / sqrt(r)``, with what the config says of this very site."""
        rank = self.modules.ranks.of(site)
        return self.modules.alphas.of(site) / (math.sqrt(rank) if self.use_rslora else rank)


def lora_variant(config: AdapterConfig) -> str:
    """The key by which a config of peft_type LORA asks for another form than ``scale * B A``; empty: none does."""
    return next(iter(_variants(config)), "")


def _variants(config: AdapterConfig) -> list[str]:
    asked = {
        "use_dora": config.flag("use_dora"),
        "use_bdlora": config.values.get("use_bdlora") is not None,
        "alora_invocation_tokens": config.has("alora_invocation_tokens"),
    }
    return [key for key, is_asked in asked.items() if is_asked]


def _check_combination(config: AdapterConfig) -> None:
    """PEFT has its variants of LoRA one at a time, and ``lora_bias`` without some of them."""
    init = config.values.get("init_lora_weights", True)
    together = _variants(config)
    if type(init) is str and init.lower() == "mica":  # a variant too, though one that computes what LoRA does
        together.append("init_lora_weights")
    if len(together) < 2 and config.flag("lora_bias"):
        other = "use_dora" if "use_dora" in together else "" if type(init) is bool else "init_lora_weights"
        together = [other, "lora_bias"] if other else []
    if len(together) > 1:
        raise UnsupportedFeature(
            f"{config.where}: {together[0]} and {together[1]} are not served together: PEFT does not combine them",
            field=together[1],
        )
