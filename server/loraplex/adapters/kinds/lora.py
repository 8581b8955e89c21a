"""LoRA and rsLoRA: ``scale * B A`` with ``scale = alpha / r`` or ``alpha / sqrt(r)``, rank and alpha per module.

Sources: LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; peft 0.21 tuners/lora/layer.py ``update_layer`` (scaling) and
utils/save_and_load.py (tensor names; a targeted embedding or head is saved with a copy of its base weight).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import SiteDelta
from loraplex.adapters.peft_config import AdapterConfig, parse_lora
from loraplex.adapters.targets import Targets
from loraplex.errors import InvalidAdapter, Mismatch
from loraplex.models.sites import Site, SiteKind

_PREFIX: Final = "base_model.model."
#: per site kind: the suffixes of A ``[r, in]`` and B ``[out, r]``
_SUFFIXES: Final = {
    SiteKind.LINEAR: (".lora_A.weight", ".lora_B.weight"),
    SiteKind.EMBEDDING: (".lora_embedding_A", ".lora_embedding_B"),
}
_BASE_COPY: Final = ".base_layer.weight"
#: modules whose base weight PEFT saves beside their factors (EMBEDDING_LAYER_NAMES)
_COPIED_MODULES: Final = ("embed_tokens", "lm_head")
_KEYS_SHOWN: Final = 4


@dataclass(slots=True)
class _Found:
    """The tensors of one site as they are gathered."""

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    base_copy: torch.Tensor | None = field(default=None)


@dataclass(frozen=True, slots=True)
class LoraKind:
    """LoRA (``use_rslora`` false) or rsLoRA (true)."""

    name: str
    use_rslora: bool

    def matches(self, config: AdapterConfig) -> bool:
        return config.peft_type == "LORA" and config.flag("use_rslora") is self.use_rslora

    def lower(
        self, config: AdapterConfig, tensors: Mapping[str, torch.Tensor], where: str, base: BaseView
    ) -> dict[str, SiteDelta]:
        """See ``AdapterKind.lower``."""
        targets = Targets(parse_lora(config))
        found = _gather(tensors, where, base)
        _check_landing(targets.select(base.sites), found, where)
        sites = [site for site in base.sites if site.name in found]
        deltas = {site.name: self._delta(site, found[site.name], targets, where, base) for site in sites}
        _check_effect(deltas.values(), where)
        return deltas

    def _delta(self, site: Site, found: _Found, targets: Targets, where: str, base: BaseView) -> SiteDelta:
        rank, alpha = targets.rank(site.name), targets.alpha(site.name)
        a = _checked(found.a, site, "A", (rank, site.in_features), where)
        b = _checked(found.b, site, "B", (site.out_features, rank), where)
        if found.base_copy is not None:
            _check_base_copy(found.base_copy, site, where, base)
        scale = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
        delta = SiteDelta(a.to(base.dtype), b.to(base.dtype), scale)
        # rounding to a narrower dtype, or the scale folded into B, may leave its range
        largest = max(_largest(delta.a), _largest(delta.b), _largest(delta.b) * scale)
        if not largest <= torch.finfo(base.dtype).max:
            raise InvalidAdapter(
                f"{where}: the factors of {site.name!r} (scale {scale:g}) leave the range of the base's {base.dtype}"
            )
        return delta


def _gather(tensors: Mapping[str, torch.Tensor], where: str, base: BaseView) -> dict[str, _Found]:
    """Tensors by site. Raises Mismatch: some land on no site."""
    sites = base.by_name()
    found: dict[str, _Found] = {}
    stray: list[str] = []
    for key, tensor in tensors.items():
        landing = _landing(key, sites)
        if landing is None:
            stray.append(key)
            continue
        site, part = landing
        setattr(found.setdefault(site, _Found()), part, tensor)
    if stray:
        shown = ", ".join(repr(key) for key in stray[:_KEYS_SHOWN])
        more = f" and {len(stray) - _KEYS_SHOWN} more" if len(stray) > _KEYS_SHOWN else ""
        raise Mismatch(
            f"{where}: target {_module_of(stray[0])!r} matches no site: tensors {shown}{more} land nowhere; "
            f"the model has {base.modules()} in {len(sites)} sites"
        )
    return found


def _landing(key: str, sites: Mapping[str, Site]) -> tuple[str, str] | None:
    """The site a tensor belongs to and the field of _Found that it is; None when it lands nowhere."""
    if not key.startswith(_PREFIX):
        return None
    rest = key[len(_PREFIX) :]
    for kind, (suffix_a, suffix_b) in _SUFFIXES.items():
        for suffix, part in ((suffix_a, "a"), (suffix_b, "b"), (_BASE_COPY, "base_copy")):
            site = sites.get(rest.removesuffix(suffix)) if rest.endswith(suffix) else None
            if site is not None and site.kind is kind and (part != "base_copy" or site.module in _COPIED_MODULES):
                return site.name, part
    return None


def _module_of(key: str) -> str:
    """The module name in a stray tensor's key, for the message."""
    rest = key.removeprefix(_PREFIX).split(".lora_", 1)[0]
    return rest.removesuffix(_BASE_COPY).rsplit(".", 1)[-1]


def _check_landing(targeted: set[str], found: Mapping[str, _Found], where: str) -> None:
    """Config and tensors must speak of the same sites."""
    adapted = {name for name, tensors in found.items() if tensors.a is not None or tensors.b is not None}
    missing, extra = sorted(targeted - adapted), sorted(set(found) - targeted)
    if not targeted:
        raise Mismatch(f"{where}: target_modules of adapter_config.json matches none of the model's sites")
    if missing:
        raise Mismatch(
            f"{where}: only part of the adapter lands: of {len(targeted)} sites that target_modules selects, "
            f"{len(missing)} have no tensors: {_some(missing)}"
        )
    if extra:
        raise Mismatch(
            f"{where}: {len(extra)} sites have tensors but are not selected by target_modules: {_some(extra)}"
        )
    for name, tensors in found.items():
        for part, tensor in (("A", tensors.a), ("B", tensors.b)):
            if tensor is None:
                raise InvalidAdapter(f"{where}: site {name!r} has no lora_{part}; A and B come in pairs")


def _checked(tensor: torch.Tensor | None, site: Site, part: str, expected: tuple[int, int], where: str) -> torch.Tensor:
    assert tensor is not None
    shape = tuple(tensor.shape)
    if shape == expected:
        return tensor
    rank_axis = 0 if part == "A" else 1
    message = f"{where}: lora_{part} of {site.name!r} has shape {list(shape)}, expected {list(expected)}"
    if len(shape) == 2 and shape[1 - rank_axis] == expected[1 - rank_axis]:
        raise InvalidAdapter(
            f"{message}: rank {shape[rank_axis]}, where adapter_config.json says {expected[rank_axis]}"
        )
    raise Mismatch(f"{message}: it was made for another base model")


def _check_base_copy(copy: torch.Tensor, site: Site, where: str, base: BaseView) -> None:
    """PEFT freezes the base weight of a targeted embedding: its copy must be the one that is served."""
    is_embedding = site.kind is SiteKind.EMBEDDING
    expected = (site.in_features, site.out_features) if is_embedding else (site.out_features, site.in_features)
    if tuple(copy.shape) != expected:
        raise Mismatch(
            f"{where}: the copy of {site.name!r} has shape {list(copy.shape)}, the base model's is {list(expected)}: "
            f"a resized vocabulary is not served"
        )
    served = base.weight(site.name) if base.weight is not None else None
    if served is None:
        return
    # both may have been rounded once on their way here
    coarser = max((copy.dtype, served.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    close = torch.isclose(copy.to(served.device).float(), served.float(), rtol=2 * torch.finfo(coarser).eps, atol=1e-6)
    if not bool(close.all()):
        raise Mismatch(f"{where}: the copy of {site.name!r} differs from the base model's weight: another base model")


def _check_effect(deltas: Iterable[SiteDelta], where: str) -> None:
    """A loaded adapter changes the logits, or the load is refused."""
    found = list(deltas)
    if all(_largest(delta.b) == 0 for delta in found):
        raise InvalidAdapter(f"{where}: the adapter changes nothing: every lora_B is zero")
    if all(_largest(delta.a) == 0 or _largest(delta.b) == 0 for delta in found):
        raise InvalidAdapter(f"{where}: the adapter changes nothing: at every site lora_A or lora_B is zero")


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().amax())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _KEYS_SHOWN} more" if len(names) > _KEYS_SHOWN else ""
    return ", ".join(names[:_KEYS_SHOWN]) + more
