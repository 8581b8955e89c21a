"""LN_TUNING: modules that are trained whole, norms by intent, but any that the config names.

PEFT puts a trained copy beside a module and saves its parameters as ``<module>.ln_tuning_layers.<parameter>``. A module
may be a container (``self_attn``): its copy holds all that lies in it.

Sources: arXiv:2312.11420; peft 0.21 tuners/ln_tuning/layer.py.
"""

from __future__ import annotations

from collections.abc import Collection
from types import MappingProxyType
from typing import Final

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.delta import SiteDelta
from loraplex.adapters.kinds.base import Lowered
from loraplex.adapters.reading.adapter_files import AdapterFiles
from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.keys import COMMON_KEYS, ConfigReader, KeyRules, served
from loraplex.adapters.reading.phrases import some
from loraplex.adapters.reading.site_tensors import refuse_convolutions
from loraplex.adapters.reading.targets import Targets
from loraplex.adapters.reading.tensors import TensorBag
from loraplex.adapters.saved.own_rows import fitted
from loraplex.errors import InvalidAdapter, Mismatch
from loraplex.layers.rows import Rows
from loraplex.models.sites import Site, SiteKind

_COPY: Final = "ln_tuning_layers"
_EXCLUSIVE: Final = "a module tuned as a whole"
#: of peft 0.21's LNTuningConfig (tuners/ln_tuning/config.py)
LN_TUNING_KEYS: Final[KeyRules] = MappingProxyType(
    {
        **COMMON_KEYS,
        "target_modules": served(),
        "exclude_modules": served(),
        "modules_to_save": served(),
    }
)


class LnTuningKind:
    """Each copy's weight, and bias where the module has one, become the adapter's own rows."""

    name: Final = "ln_tuning"
    keys: Final = LN_TUNING_KEYS

    def matches(self, config: AdapterConfig) -> bool:
        return config.peft_type == "LN_TUNING"

    def lower(self, files: AdapterFiles, base: BaseView) -> Lowered:
        """See ``AdapterKind.lower``."""
        rule = ConfigReader(files.config).target_rule()
        targets = Targets(rule)
        refuse_convolutions(rule, targets, base)
        known = base.by_name()
        modules, parameters = _take(files.tensors, known)
        # a container is no site, and the rule asks for no more than its name
        chosen = targets.select(known.get(module, Site(module, SiteKind.NORM, 0, 0)) for module in modules)
        if chosen != modules:
            raise Mismatch(
                f"{files.tensors.where}: tensors of modules that target_modules does not select: "
                f"{some(sorted(modules - chosen))}"
            )
        inside = tuple(f"{module}." for module in modules)
        expected = targets.select(base.sites) | {site.name for site in base.sites if site.name.startswith(inside)}
        if not expected:
            raise rule.matches_none(base.modules())
        sites = [site for site in base.sites if site.name in expected]
        deltas = {site.name: _delta(site, parameters, base, files.tensors.where) for site in sites}
        if parameters:
            raise Mismatch(
                f"{files.tensors.where}: {len(parameters)} tensors land nowhere: {some(list(parameters))}; the model "
                f"has {base.modules()}"
            )
        return Lowered(deltas)


def _take(bag: TensorBag, sites: Collection[str]) -> tuple[set[str], dict[str, torch.Tensor]]:
    """The copied modules, and every parameter by the name it has in the base model.

    PEFT takes its own name for the adapter out of a parameter's name only where that is short: a container's parameters
    keep it (``self_attn.ln_tuning_layers.default.q_proj.weight``), unless they are its own (``A_log``).
    """
    modules: set[str] = set()
    parameters: dict[str, torch.Tensor] = {}
    for name in bag:
        module, found, rest = name.partition(f".{_COPY}.")
        if not found or (tensor := bag.take(name)) is None:
            continue
        modules.add(module)
        if module not in sites:
            rest = rest.partition(".")[2] or rest
        if parameters.setdefault(f"{module}.{rest}", tensor) is not tensor:
            raise InvalidAdapter(f"{bag.where}: two tensors for {module}.{rest}: one module is copied inside another")
    return modules, parameters


def _delta(site: Site, parameters: dict[str, torch.Tensor], base: BaseView, where: str) -> SiteDelta:
    weight, bias = parameters.pop(site.weight_key, None), parameters.pop(f"{site.name}.bias", None)
    if weight is None or (site.bias and bias is None):
        part = "weight" if weight is None else "bias"
        raise Mismatch(f"{where}: only part of the adapter lands: there is no {part} of {site.name!r}")
    if bias is not None and not site.bias:
        raise Mismatch(f"{where}: {site.name!r} has a bias here, and none in the base model")
    shape = site.weight_shape
    for part, tensor, expected in (("weight", weight, shape), ("bias", bias, shape[:1])):
        if tensor is not None and tuple(tensor.shape) != expected:
            raise Mismatch(
                f"{where}: the {part} of {site.name!r} has shape {list(tensor.shape)}, expected {list(expected)}: it "
                f"was made for another base model"
            )
    what = f"{where}: the copy of {site.name!r}"
    own = fitted(weight, base.dtype, what), None if bias is None else fitted(bias, base.dtype, what)
    return SiteDelta(rows=Rows(own[0].reshape(site.rows_shape), None, own[1]), exclusive=_EXCLUSIVE)
