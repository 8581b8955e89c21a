"""Biases of the base model that an adapter was trained with, and saved: PEFT's key ``bias``.

Source: peft 0.21 tuners/tuners_utils.py ``_get_learnable_bias_state_dict``. A targeted module's bias is saved below
``base_layer``, any other under its own name; both replace the base's for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import SiteDelta
from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.phrases import shown, some
from loraplex.adapters.reading.tensors import TensorBag
from loraplex.adapters.saved.own_rows import Whole, fitted, whole_rows
from loraplex.errors import InvalidAdapter, Mismatch
from loraplex.models.sites import Site, SiteKind

_EXCLUSIVE: Final = "a convolution with a bias of its own"


@dataclass(frozen=True, slots=True)
class OwnBiases:
    """Biases that are not the base's. ``shifts``: site -> what a linear site's differs by, ``[out]`` float32;
    ``convolutions``: site -> its change, all of its rows with the bias."""

    shifts: dict[str, torch.Tensor] = field(default_factory=dict)
    convolutions: dict[str, SiteDelta] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.shifts or self.convolutions)

    def beside(self, deltas: dict[str, SiteDelta]) -> dict[str, SiteDelta]:
        """``deltas``, which have the biases of their sites in them, with those of all others."""
        shifts = {name: SiteDelta(shift=shift) for name, shift in self.shifts.items() if name not in deltas}
        return deltas | shifts | self.convolutions


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
    ) -> OwnBiases:
        """The biases that differ from the base's. ``is_saved``: whether a module is saved as a whole, whose bias is not
        this key's business.

        Raises Mismatch: a bias that should have been saved is missing, or is not of the base's shape. InvalidAdapter:
        values leave the range of the base's dtype.
        """
        found = OwnBiases()
        if self.mode == "none":
            return found
        missing: list[str] = []
        for site in base.of(SiteKind.LINEAR, SiteKind.CONV):
            if not site.bias or is_saved(site.name) or (site.name not in targeted and self.mode != "all"):
                continue
            saved = tensors.take(site.name + (".base_layer.bias" if site.name in targeted else ".bias"))
            if saved is None:
                missing.append(site.name)
            elif not bool((difference := _difference(saved, site, base, tensors.where)).any()):
                continue
            elif site.kind is SiteKind.LINEAR:
                found.shifts[site.name] = difference
            else:
                own = fitted(saved, base.dtype, f"{tensors.where}: the bias of {site.name!r}")
                rows = whole_rows(Whole(base.weight(site.name)), own)
                found.convolutions[site.name] = SiteDelta(rows=rows, exclusive=_EXCLUSIVE)
        if missing:
            raise Mismatch(
                f"{tensors.where}: bias={self.mode!r} in {self.where}, but no bias is there of {some(missing)}"
            )
        return found


def _difference(saved: torch.Tensor, site: Site, base: BaseView, where: str) -> torch.Tensor:
    own = base.bias(site.name)
    assert own is not None
    if saved.shape != own.shape:
        raise Mismatch(
            f"{where}: the bias of {site.name!r} has shape {list(saved.shape)}, expected {list(own.shape)}: it was "
            f"made for another base model"
        )
    return saved.float() - own.float()
