"""Biases of the base model that an adapter was trained with, and saved: PEFT's key ``bias``.

Source: peft 0.21 tuners/tuners_utils.py ``_get_learnable_bias_state_dict``. A targeted module's bias is saved below
``base_layer``, any other under its own name; both replace the base's for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.phrases import shown, some
from loraplex.adapters.reading.tensors import TensorBag
from loraplex.errors import InvalidAdapter, Mismatch
from loraplex.models.sites import Site, SiteKind


@dataclass(frozen=True, slots=True)
class SavedBiases:
    """The key ``bias`` of a config: ``none``, ``all`` or the kind's own word (``lora_only``)."""

    mode: str
    where: str

    @staticmethod
    def of(config: AdapterConfig, own_word: str) -> SavedBiases:
        """Raises InvalidAdapter: another word."""
        mode, allowed = config.values.get("bias", "none"), ("none", "all", own_word)
        if type(mode) is not str or mode not in allowed:
            raise InvalidAdapter(
                f"{config.where}: bias is {shown(mode)}; expected one of {', '.join(allowed)}", field="bias"
            )
        return SavedBiases(mode, config.where)

    def take(
        self, tensors: TensorBag, base: BaseView, targeted: Collection[str], is_saved: Callable[[str], bool]
    ) -> dict[str, torch.Tensor]:
        """Site name -> what its bias differs by from the base's, ``[out]`` float32; sites without a difference are not
        there. ``is_saved``: whether a module is saved as a whole, whose bias is not this key's business.

        Raises Mismatch: a bias that should have been saved is missing, or is not of the base's shape.
        """
        if self.mode == "none":
            return {}
        differences: dict[str, torch.Tensor] = {}
        missing: list[str] = []
        for site in base.of(SiteKind.LINEAR):
            if site.bias and not is_saved(site.name) and (site.name in targeted or self.mode == "all"):
                found = tensors.take(site.name + (".base_layer.bias" if site.name in targeted else ".bias"))
                if found is None:
                    missing.append(site.name)
                elif bool((difference := _difference(found, site, base, tensors.where)).any()):
                    differences[site.name] = difference
        if missing:
            raise Mismatch(
                f"{tensors.where}: bias={self.mode!r} in {self.where}, but no bias is there of {some(missing)}"
            )
        return differences


def _difference(saved: torch.Tensor, site: Site, base: BaseView, where: str) -> torch.Tensor:
    own = base.bias(site.name)
    assert own is not None
    if saved.shape != own.shape:
        raise Mismatch(
            f"{where}: the bias of {site.name!r} has shape {list(saved.shape)}, expected {list(own.shape)}: it was "
            f"made for another base model"
        )
    return saved.float() - own.float()
