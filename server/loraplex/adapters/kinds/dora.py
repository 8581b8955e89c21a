"""DoRA: ``m * (W + s B A) / ||W + s B A||``, row by row of a linear layer, feature by feature of an embedding.

Sources: DoRA, arXiv:2402.09353; peft 0.21 tuners/lora/dora.py and tuners/lora/variants.py. The norm is that of the base
weight with the factors as they were saved, so it is taken once, here. A layer's bias is not scaled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import LowRank, SiteDelta
from loraplex.adapters.kinds.base import Lowered
from loraplex.adapters.lora_family.keys import LORA_KEYS
from loraplex.adapters.lora_family.plan import lora_variant
from loraplex.adapters.lora_family.reading import read_lora
from loraplex.adapters.lora_family.tensors import LoraPair
from loraplex.adapters.reading.adapter_files import AdapterFiles
from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.keys import KeyRules
from loraplex.adapters.reading.tensors import TensorBag
from loraplex.errors import InvalidAdapter, Mismatch, UnsupportedFeature

#: PEFT writes the first, and the second as well beside a whole embedding that it saves; it reads both
_MAGNITUDES: Final = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
_TOKENS: Final = "trainable_token_indices"
_EXCLUSIVE: Final = "a DoRA, whose magnitudes hold for its own sum"


@dataclass(frozen=True, slots=True)
class DoraKind:
    """DoRA, with LoRA's or rsLoRA's scale."""

    name: str = "dora"

    @property
    def keys(self) -> KeyRules:
        return LORA_KEYS

    def matches(self, config: AdapterConfig) -> bool:
        return config.peft_type == "LORA" and lora_variant(config) == "use_dora"

    def lower(self, files: AdapterFiles, base: BaseView) -> Lowered:
        """See ``AdapterKind.lower``."""
        config = files.config
        reading = read_lora(files, base)
        if base.tied and config.has(_TOKENS) and any(pair.site.is_head for pair in reading.pairs):
            raise UnsupportedFeature(
                f"{config.where}: {_TOKENS} together with use_dora at a head tied to the embedding is not served: PEFT "
                f"cannot run it",
                field=_TOKENS,
            )
        deltas = {
            pair.site.name: _delta(pair, _magnitude(pair, files.tensors), files.tensors.where, base)
            for pair in reading.pairs
        }
        return Lowered(reading.completed(deltas))


def _magnitude(pair: LoraPair, bag: TensorBag) -> torch.Tensor:
    """m, ``[out]`` float32."""
    site = pair.site
    written = [tensor for end in _MAGNITUDES if (tensor := bag.take(site.name + end)) is not None]
    if not written:
        raise InvalidAdapter(f"{bag.where}: use_dora is set, but {site.name!r} has no lora_magnitude_vector")
    found, *again = written
    if any(not torch.equal(found, other) for other in again):
        raise InvalidAdapter(
            f"{bag.where}: lora_magnitude_vector and lora_magnitude_vector.weight of {site.name!r} differ"
        )
    if tuple(found.shape) != (site.out_features,):
        raise Mismatch(
            f"{bag.where}: lora_magnitude_vector of {site.name!r} has shape {list(found.shape)}, expected "
            f"[{site.out_features}]"
        )
    return found.float()


def _delta(pair: LoraPair, magnitude: torch.Tensor, where: str, base: BaseView) -> SiteDelta:
    # from the factors as they were saved
    out_scale = magnitude / base.row_norms(pair.site, LowRank(pair.a, pair.b, pair.scale))
    if not bool(out_scale.isfinite().all()):
        raise InvalidAdapter(
            f"{where}: a row of {pair.site.name!r} with its lora_B lora_A is zero: it has no direction"
        )
    # y = o (W x + b) + shift must end in the unscaled bias
    bias = base.bias(pair.site.name) if pair.site.bias else None
    unscaled = None if bias is None else (1 - out_scale) * bias.float()
    shifts = [shift for shift in (unscaled, pair.shift) if shift is not None]
    return replace(
        pair.delta(base.dtype),
        out_scale=out_scale,
        shift=torch.stack(shifts).sum(0) if shifts else None,
        exclusive=_EXCLUSIVE,
    )
