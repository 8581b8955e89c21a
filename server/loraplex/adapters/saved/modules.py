"""Whole modules that an adapter was trained with and saved: PEFT's key ``modules_to_save``.

Source: peft 0.21 utils/other.py ``_set_trainable`` (a name stands for every module whose name ends in it, with or
without a dot before) and ``ModulesToSaveWrapper``; tuners/lora/model.py ``_add_modules_to_save_to_tie``. A file holds
such a module under its own name. PEFT ignores names that no module has: tensors of theirs land nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import torch

from loraplex.adapters.base_view import BaseView
from loraplex.adapters.reading.adapter_files import AdapterFiles
from loraplex.adapters.reading.config_file import AdapterConfig
from loraplex.adapters.reading.keys import ConfigReader
from loraplex.adapters.reading.tensors import TensorBag
from loraplex.adapters.saved.own_rows import Whole
from loraplex.errors import InvalidAdapter, Mismatch, UnsupportedFeature
from loraplex.models.sites import ENDS, Site, SiteKind

KEY: Final = "modules_to_save"
#: what older settings of PEFT write beside a saved module: its frozen original, and the module once more
ORIGINAL: Final = "original_module"
_ALIAS: Final = "modules_to_save"


@dataclass(frozen=True, slots=True)
class SavedModules:
    """Site -> its parameters as the adapter has them; an embedding's and the head's may have more rows than the base.

    ``originals``: what lies frozen behind a saved embedding or head, where the file has it. ``tied``: the head is the
    saved embedding.
    """

    sites: dict[str, Whole] = field(default_factory=dict)
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    tied: bool = False


def read_saved_modules(files: AdapterFiles, base: BaseView) -> SavedModules:
    """Take every saved module's tensors out of the bag; shapes are checked but for the vocabulary's size.

    Raises:
        InvalidAdapter: a tensor is missing, or tied modules differ.
        Mismatch: a shape that is not the base's.
        UnsupportedFeature: modules that PEFT cannot save either, by name.
    """
    names = ConfigReader(files.config).names(KEY)
    tied = _ties(files.config, names, base)
    if tied:
        ends = tuple(site.name for site in base.ends())
        names = (*(name for name in names if not any(end.endswith(name) for end in ends)), *ends)
    found = SavedModules(tied=tied)
    for module in _modules(names, base, files.config.where):
        for site in _inside(module, base.sites):
            found.sites[site.name] = _take(site, module, files.tensors)
            original = _take_beside(site, module, files.tensors, found.sites[site.name])
            if original is not None and site.is_end:
                found.originals[site.name] = original
    if tied:
        _check_tied([found.sites[site.name] for site in base.ends()], files.tensors.where)
    return found


def _ties(config: AdapterConfig, names: tuple[str, ...], base: BaseView) -> bool:
    """Saving either end ties both, where the base's are tied and the config asks for it."""
    asked = config.flag("ensure_weight_tying") and base.tied
    return asked and any(name.rsplit(".", 1)[-1] in ENDS for name in names)


def _modules(names: tuple[str, ...], base: BaseView, where: str) -> list[str]:
    """The modules that ``names`` stand for. Raises UnsupportedFeature: one that cannot be saved, or inside another."""
    known = dict.fromkeys(module for site in base.sites for module in _upwards(site))
    found = [module for module in known if module.endswith(names)] if names else []
    for module in found:
        if any(name.startswith(f"{module}.") and name[len(module) + 1 :].split(".")[0].isdigit() for name in known):
            raise _refused(where, f"{module!r} is a list of modules, which PEFT cannot save as one")
        outer = next((other for other in found if module.startswith(f"{other}.")), None)
        if outer is not None:
            raise _refused(where, f"{module!r} lies in {outer!r}, which is saved as well")
    return found


def _refused(where: str, why: str) -> UnsupportedFeature:
    return UnsupportedFeature(f"{where}: {KEY}: {why}", field=KEY)


def _upwards(site: Site) -> Iterator[str]:
    """The name of a site's module, and those of all that it lies in. A vector's module is the one it stands in."""
    parts = site.name.split(".")
    if site.kind is SiteKind.VECTOR:
        del parts[-1]
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))


def _inside(module: str, sites: Iterable[Site]) -> list[Site]:
    return [site for site in sites if site.name == module or site.name.startswith(f"{module}.")]


def _take(site: Site, module: str, bag: TensorBag) -> Whole:
    weight, bias = bag.take(site.weight_key), bag.take(f"{site.name}.bias") if site.bias else None
    if weight is None or (site.bias and bias is None):
        missing = site.weight_key if weight is None else f"{site.name}.bias"
        raise InvalidAdapter(f"{bag.where}: {KEY} names {module!r}, but tensor {missing!r} is missing")
    expected = site.weight_shape
    grows = site.is_end and weight.shape[1:] == expected[1:]
    if tuple(weight.shape) != expected and not grows:
        raise Mismatch(_wrong_shape(bag.where, site, "weight", weight, expected))
    if bias is not None and tuple(bias.shape) != expected[:1]:
        raise Mismatch(_wrong_shape(bag.where, site, "bias", bias, expected[:1]))
    return Whole(weight, bias)


def _wrong_shape(where: str, site: Site, part: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> str:
    return (
        f"{where}: the saved {part} of {site.name!r} has shape {list(tensor.shape)}, expected {list(expected)}: it was "
        f"made for another base model"
    )


def _take_beside(site: Site, module: str, bag: TensorBag, saved: Whole) -> torch.Tensor | None:
    """The frozen weight behind a saved module, if it is there; takes the module's aliases, which must be equal."""
    weight_key, bias_key = site.weight_key, f"{site.name}.bias"
    for key, own in ((weight_key, saved.weight), (bias_key, saved.bias)):
        if own is None:
            continue
        for name in _aliases(module, key.removeprefix(f"{module}."), bag):
            alias = bag.take(name)
            if alias is not None and not torch.equal(alias, own):
                raise InvalidAdapter(f"{bag.where}: {name!r} and {key!r} differ")
    bag.take(f"{module}.{ORIGINAL}{bias_key.removeprefix(module)}")
    return bag.take(f"{module}.{ORIGINAL}{weight_key.removeprefix(module)}")


def _aliases(module: str, parameter: str, bag: TensorBag) -> list[str]:
    """Names of a saved module's parameter in PEFT's wrapper, with the adapter's own name in between (of a container's
    parameters, where ``bias`` is ``all``) or without it."""
    begin = f"{module}.{_ALIAS}."
    found = [name for name in bag if name.startswith(begin)]
    return [name for name in found if parameter in (name[len(begin) :], name[len(begin) :].partition(".")[2])]


def _check_tied(ends: list[Whole], where: str) -> None:
    if not all(torch.equal(ends[0].weight, end.weight) for end in ends):
        raise InvalidAdapter(f"{where}: ensure_weight_tying is set, but the saved embedding and head differ")
