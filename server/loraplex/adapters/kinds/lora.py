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
from loraplex.adapters.peft_config import AdapterConfig, LoraConfig, parse_lora
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
_TARGETS_SHOWN_CHARS: Final = 200


@dataclass(frozen=True, slots=True)
class _Landed:
    """The adapter's tensors by site."""

    a: dict[str, torch.Tensor] = field(default_factory=dict)
    b: dict[str, torch.Tensor] = field(default_factory=dict)
    base_copies: dict[str, torch.Tensor] = field(default_factory=dict)

    def place(self, key: str, tensor: torch.Tensor, sites: Mapping[str, Site]) -> bool:
        """Put a tensor where its key says; False when it lands nowhere."""
        if not key.startswith(_PREFIX):
            return False
        rest = key[len(_PREFIX) :]
        for kind, (suffix_a, suffix_b) in _SUFFIXES.items():
            for suffix, place in ((suffix_a, self.a), (suffix_b, self.b), (_BASE_COPY, self.base_copies)):
                site = sites.get(rest.removesuffix(suffix)) if rest.endswith(suffix) else None
                if site is None or site.kind is not kind:
                    continue
                if place is not self.base_copies or site.module in _COPIED_MODULES:
                    place[site.name] = tensor
                    return True
        return False


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
        lora = parse_lora(config)
        targets = Targets(lora)
        landed = _land(tensors, where, base)
        targeted = targets.select(base.sites)
        if not targeted:
            raise Mismatch(
                f"{lora.where}: target_modules {_targets_shown(lora)} matches none of the model's sites; "
                f"the model has {base.modules()}"
            )
        _check_landing(targeted, landed, where)
        sites = [site for site in base.sites if site.name in targeted]
        deltas = {site.name: self._delta(site, landed, targets, where, base) for site in sites}
        _check_effect(deltas.values(), where)
        return deltas

    def _delta(self, site: Site, landed: _Landed, targets: Targets, where: str, base: BaseView) -> SiteDelta:
        rank, alpha = targets.rank(site.name), targets.alpha(site.name)
        a = _checked(landed.a[site.name], site, "A", (rank, site.in_features), where)
        b = _checked(landed.b[site.name], site, "B", (site.out_features, rank), where)
        if site.name in landed.base_copies:
            _check_base_copy(landed.base_copies[site.name], site, where, base)
        scale = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
        delta = SiteDelta(a.to(base.dtype), b.to(base.dtype), scale)
        # rounding to a narrower dtype, or the scale folded into B, may leave its range
        largest = max(_largest(delta.a), _largest(delta.b), _largest(delta.b) * scale)
        if not largest <= torch.finfo(base.dtype).max:
            raise InvalidAdapter(
                f"{where}: the factors of {site.name!r} (scale {scale:g}) leave the range of the base's {base.dtype}"
            )
        return delta


def _land(tensors: Mapping[str, torch.Tensor], where: str, base: BaseView) -> _Landed:
    """Tensors by site. Raises Mismatch: some land on no site."""
    sites = base.by_name()
    landed = _Landed()
    stray = [key for key, tensor in tensors.items() if not landed.place(key, tensor, sites)]
    if stray:
        raise Mismatch(
            f"{where}: target {_module_of(stray[0])!r} matches no site: {len(stray)} tensors land nowhere: "
            f"{_some(stray)}; the model has {base.modules()} in {len(sites)} sites"
        )
    return landed


def _targets_shown(lora: LoraConfig) -> str:
    """``target_modules`` for a message: short, whatever it is."""
    value = lora.target_modules
    text = repr(value) if isinstance(value, str) else _some([repr(name) for name in value])
    return text if len(text) <= _TARGETS_SHOWN_CHARS else f"{text[:_TARGETS_SHOWN_CHARS]}..."


def _module_of(key: str) -> str:
    """The module name in a stray tensor's key, for the message."""
    rest = key.removeprefix(_PREFIX).split(".lora_", 1)[0]
    return rest.removesuffix(_BASE_COPY).rsplit(".", 1)[-1]


def _check_landing(targeted: set[str], landed: _Landed, where: str) -> None:
    """Config and tensors must speak of the same sites, and every A has its B."""
    adapted = {*landed.a, *landed.b}
    missing, extra = sorted(targeted - adapted), sorted({*adapted, *landed.base_copies} - targeted)
    if missing:
        raise Mismatch(
            f"{where}: only part of the adapter lands: of {len(targeted)} sites that target_modules selects, "
            f"{len(missing)} have no tensors: {_some(missing)}"
        )
    if extra:
        raise Mismatch(
            f"{where}: {len(extra)} sites have tensors but are not selected by target_modules: {_some(extra)}"
        )
    for part, one, other in (("A", landed.a, landed.b), ("B", landed.b, landed.a)):
        lonely = sorted(other.keys() - one.keys())
        if lonely:
            raise InvalidAdapter(f"{where}: sites without lora_{part}, which comes in a pair: {_some(lonely)}")


def _checked(tensor: torch.Tensor, site: Site, part: str, expected: tuple[int, int], where: str) -> torch.Tensor:
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
