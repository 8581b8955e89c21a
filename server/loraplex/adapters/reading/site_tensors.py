"""A kind's own tensors, by the site that each is for: the sites the config targets, all of them and no others.

For kinds that PEFT puts into linear layers alone, and whose tensors are named ``<site>.<part>`` (``hada_w1_a``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import LowRank
from loraplex.adapters.reading.adapter_files import AdapterFiles
from loraplex.adapters.reading.phrases import some
from loraplex.adapters.reading.targets import TargetRule, Targets
from loraplex.adapters.reading.tensors import TensorBag
from loraplex.errors import InvalidAdapter, Mismatch, OverCapacity, UnsupportedFeature
from loraplex.models.sites import Site, SiteKind


@dataclass(frozen=True, slots=True)
class SiteTensors:
    """One site's tensors by their part of the name. ``where`` names their file."""

    site: Site
    parts: Mapping[str, torch.Tensor]
    where: str

    def take(self, part: str, shape: tuple[int, ...], of_config: Collection[int] = ()) -> torch.Tensor:
        """One part in float32, which must have this shape. ``of_config``: the axes whose size the config says, where
        the base model says the others'.

        Raises:
            InvalidAdapter: it is missing, or differs from what the config says.
            Mismatch: it was made for layers of another shape.
        """
        tensor = self.parts.get(part)
        if tensor is None:
            raise InvalidAdapter(f"{self.where}: {self.site.name!r} has no {part}, which it needs")
        found = tuple(tensor.shape)
        if found == shape:
            return tensor.float()
        message = f"{self.where}: {part} of {self.site.name!r} has shape {list(found)}, expected {list(shape)}"
        if len(found) != len(shape):
            raise InvalidAdapter(message)
        if all(found[axis] == shape[axis] for axis in range(len(shape)) if axis not in of_config):
            raise InvalidAdapter(f"{message}: adapter_config.json says otherwise")
        raise Mismatch(f"{message}: {made_for_another(self.site, found, shape)}")

    def low_rank(self, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype) -> LowRank:
        """``scale * b a`` with factors rounded once to ``dtype``. a: ``[r, in]``, b: ``[out, r]``, both float32.

        Raises InvalidAdapter: the rounded factors leave the dtype's range, the scale counted in.
        """
        rounded = LowRank(a.to(dtype), b.to(dtype), scale)
        for factor, by in ((rounded.a, 1.0), (rounded.b, max(1.0, abs(scale)))):
            if factor.numel() and not float(factor.abs().amax()) * by <= torch.finfo(dtype).max:
                raise InvalidAdapter(
                    f"{self.where}: the factors of {self.site.name!r} (scale {scale:g}) leave the range of the base's "
                    f"{dtype}"
                )
        return rounded


def made_for_another(site: Site, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Why a tensor of a site has another shape than expected, for people: what the site's outputs are, where their
    number differs."""
    why = "it was made for another base model"
    if not site.outputs or not found or found[0] == expected[0] or expected[0] != site.out_features:
        return why
    return f"{why}, or for some of the outputs, which are {site.outputs}"


def check_room(ranks: Mapping[Site, int], files: AdapterFiles, base: BaseView) -> None:
    """``ranks``: of the low-rank form that each site's tensors will be expanded to. Asked before they are.

    Raises OverCapacity: all of it together takes more than the adapter may.
    """
    elements = sum(rank * (site.in_features + site.out_features) for site, rank in ranks.items())
    if (nbytes := elements * base.dtype.itemsize) > files.max_bytes:
        raise OverCapacity(
            f"{files.tensors.where}: its exact low-rank form takes {nbytes} bytes (rank {max(ranks.values())}, "
            f"{len(ranks)} sites); at most {files.max_bytes} are allowed (max_adapter_bytes)"
        )


def targeted_linears(rule: TargetRule, targets: Targets, base: BaseView) -> tuple[Site, ...]:
    """The linear sites that the config targets, in site order.

    Raises Mismatch: there is none, or another module is targeted, which PEFT refuses too. UnsupportedFeature: a
    convolution is.
    """
    refuse_convolutions(rule, targets, base)
    chosen = targets.select(base.sites)
    found = [site for site in base.sites if site.name in chosen]
    if not found:
        raise rule.matches_none(base.modules())
    others = [site.name for site in found if site.kind is not SiteKind.LINEAR]
    if others:
        raise Mismatch(
            f"{rule.where}: target_modules {rule.shown()} matches modules that are no linear layers, the only ones "
            f"that this kind adapts: {some(others)}",
            field="target_modules",
        )
    return tuple(found)


def refuse_convolutions(rule: TargetRule, targets: Targets, base: BaseView) -> None:
    """Raises UnsupportedFeature: the config adapts the convolution of a state-space layer.

    Its layer reads the weight itself, past anything that PEFT puts around the module, which is why PEFT refuses LoRA
    there (tuners/tuners_utils.py ``_check_lora_target_modules_mamba``). Saved as a whole it is what the layer reads.
    """
    for site in base.of(SiteKind.CONV):
        if targets.select((site,)):
            raise UnsupportedFeature(
                f"{rule.where}: target_modules {rule.shown()} matches {site.name!r}, a convolution of each channel by "
                f"itself, whose layer reads its weight past any adapter that PEFT puts there; name it in "
                f"modules_to_save instead",
                field="target_modules",
            )


def take_site_tensors(bag: TensorBag, sites: Collection[Site], parts: Collection[str]) -> dict[str, SiteTensors]:
    """Of every site its tensors, which are ``<site>.<part>`` for some of ``parts``, out of the bag.

    Raises Mismatch: a site has none; or tensors of these parts are there for something else.
    """
    found = {site.name: SiteTensors(site, {}, bag.where) for site in sites}
    landed: dict[str, dict[str, torch.Tensor]] = {name: {} for name in found}
    strays: list[str] = []
    for name in bag:
        owner, _, part = name.rpartition(".")
        if part not in parts:
            continue
        if owner not in landed:
            strays.append(name)
        elif (tensor := bag.take(name)) is not None:
            landed[owner][part] = tensor
    missing = [name for name, tensors in landed.items() if not tensors]
    if strays:
        raise Mismatch(
            f"{bag.where}: {len(strays)} tensors land nowhere, on no site that target_modules selects: {some(strays)}"
        )
    if missing:
        raise Mismatch(
            f"{bag.where}: only part of the adapter lands: of {len(landed)} sites that target_modules selects, "
            f"{len(missing)} have no tensors: {some(missing)}"
        )
    return {name: SiteTensors(entry.site, landed[name], bag.where) for name, entry in found.items()}
