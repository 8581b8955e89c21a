"""VeRA: one random pair of matrices shared by all layers, and two learned vectors a layer.

The change of a layer is ``(lambda_b o B[:out]) (lambda_d o A[:, :in])``: a low-rank one, with the vectors folded in.
A is ``[r, widest in]`` and B ``[widest out, r]`` over the targeted layers. They are saved with the adapter, or
(``save_projection`` false) drawn again from ``projection_prng_key``: PEFT draws them on the CPU with a generator of
their own, so that the same numbers come out here.

Sources: arXiv:2310.11454; peft 0.21 tuners/vera/layer.py ``Linear.forward`` and tuners/vera/model.py ``_find_dim``,
``_kaiming_init`` and ``_get_adapter_state_dict`` (tensor names).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
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
    ConfigReader,
    KeyRules,
    harmless,
    is_bool,
    is_number,
    served,
)
from loraplex.adapters.reading.site_tensors import SiteTensors, check_room, take_site_tensors, targeted_linears
from loraplex.adapters.reading.targets import Targets
from loraplex.errors import InvalidAdapter, Mismatch
from loraplex.models.sites import Site

_LAMBDA_B: Final = "vera_lambda_b"
_LAMBDA_D: Final = "vera_lambda_d"
_SHARED: Final = ("base_model.vera_A", "base_model.vera_B")
#: what a generator takes as its seed
_SEEDS: Final = range(-(1 << 63), 1 << 64)
#: of peft 0.21's VeraConfig (tuners/vera/config.py)
VERA_KEYS: Final[KeyRules] = MappingProxyType(
    {
        **COMMON_KEYS,
        "r": served(),
        "projection_prng_key": served(),
        "save_projection": served(is_bool),
        "target_modules": served(),
        "layers_to_transform": served(),
        "layers_pattern": served(),
        "bias": served(),
        "modules_to_save": served(),
        "vera_dropout": harmless(is_number),
        "d_initial": harmless(is_number),
        "init_weights": harmless(is_bool),
        # how a layer stores its weight, which PEFT finds out by itself
        "fan_in_fan_out": harmless(is_bool),
    }
)


@dataclass(frozen=True, slots=True)
class _Projections:
    """a: ``[r, widest in]``, b: ``[widest out, r]``, both float32."""

    a: torch.Tensor
    b: torch.Tensor


class VeraKind:
    """``vera_lambda_b`` ``[out]`` and ``vera_lambda_d`` ``[r]`` of a layer, and what they scale."""

    name: Final = "vera"
    keys: Final = VERA_KEYS

    def matches(self, config: AdapterConfig) -> bool:
        return config.peft_type == "VERA"

    def lower(self, files: AdapterFiles, base: BaseView) -> Lowered:
        """See ``AdapterKind.lower``."""
        rule = ConfigReader(files.config).target_rule()
        targets = Targets(rule)
        sites = targeted_linears(rule, targets, base)
        check_room(dict.fromkeys(sites, ConfigReader(files.config).rank("r", 256)), files, base)
        found = take_site_tensors(files.tensors, sites, (_LAMBDA_B, _LAMBDA_D))
        shared = _projections(files, sites)
        biases = SavedBiases.of(files.config, "vera_only").take(files.tensors, base, found, targets.is_saved)
        deltas = {name: _delta(tensors, shared, biases.shifts.get(name), base) for name, tensors in found.items()}
        return Lowered(biases.beside(deltas))


def _delta(tensors: SiteTensors, shared: _Projections, shift: torch.Tensor | None, base: BaseView) -> SiteDelta:
    site, rank = tensors.site, len(shared.a)
    lambda_b = tensors.take(_LAMBDA_B, (site.out_features,))
    lambda_d = tensors.take(_LAMBDA_D, (rank,), of_config=(0,))
    a = lambda_d.unsqueeze(1) * shared.a[:, : site.in_features]
    b = lambda_b.unsqueeze(1) * shared.b[: site.out_features]
    return SiteDelta(tensors.low_rank(a, b, 1.0, base.dtype), shift=shift)


def _projections(files: AdapterFiles, sites: Collection[Site]) -> _Projections:
    reader, where = ConfigReader(files.config), files.tensors.where
    rank = reader.rank("r", 256)
    shapes = (rank, max(site.in_features for site in sites)), (max(site.out_features for site in sites), rank)
    if not reader.flag("save_projection", default=True):
        return _drawn(reader, shapes)
    found: list[torch.Tensor] = []
    for name, shape, axis in zip(_SHARED, shapes, (0, 1), strict=True):
        tensor = files.tensors.take_shared(name)
        if tensor is None:
            raise InvalidAdapter(
                f"{where}: {name} is missing; save_projection is true in {files.config.where}, so it belongs here"
            )
        if tuple(tensor.shape) != shape:
            message = f"{where}: {name} has shape {list(tensor.shape)}, expected {list(shape)}"
            if tensor.dim() == 2 and tensor.shape[1 - axis] == shape[1 - axis]:
                raise InvalidAdapter(f"{message}: adapter_config.json says r={rank}")
            raise Mismatch(f"{message}, by the widest of the targeted layers: it was made for another base model")
        found.append(tensor.float())
    return _Projections(*found)


def _drawn(reader: ConfigReader, shapes: tuple[tuple[int, int], tuple[int, int]]) -> _Projections:
    """Kaiming-uniform, one after the other from one generator: ``sqrt(3) * (sqrt(2) / sqrt(fan in))`` is the bound."""
    key = reader.integer("projection_prng_key", 0, minimum=_SEEDS.start)
    if key not in _SEEDS:
        raise reader.wrong("projection_prng_key", key, "an integer of at most 64 bits")
    generator = torch.Generator(device="cpu").manual_seed(key)
    drawn: list[torch.Tensor] = []
    for shape in shapes:
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        drawn.append(torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
    return _Projections(*drawn)
