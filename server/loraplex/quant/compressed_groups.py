"""The ``quantization_config`` of compressed-tensors: which matrices are stored how, and what of it we refuse."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NoReturn

from loraplex.errors import InvalidModel, UnsupportedFeature
from loraplex.json_config import ConfigFields
from loraplex.quant.base import Matrix
from loraplex.quant.scale_grid import CHANNEL, STEP_COLUMNS, TENSOR, ScaleGrid

_log = logging.getLogger(__name__)

PACKED: Final = "pack-quantized"
MIXED: Final = "mixed-precision"
#: how groups may be stored -> type of their weights -> numbers of bits
_FORMATS: Final[Mapping[str, Mapping[str, tuple[int, ...]]]] = MappingProxyType(
    {
        PACKED: {"int": (4, 8)},
        "int-quantized": {"int": (4, 8)},
        "float-quantized": {"float": (8,)},
        "naive-quantized": {"int": (4, 8), "float": (8,)},
    }
)
_STRATEGIES: Final = ("tensor", "channel", "group", "block")
#: actorder of weights -> whether they have a weight_g_idx
_ORDERS: Final[Mapping[str, bool]] = MappingProxyType(
    {"none": False, "false": False, "weight": False, "static": False, "true": True, "group": True, "dynamic": True}
)
_REGEX: Final = "re:"


@dataclass(frozen=True, slots=True)
class Group:
    """How the matrices of a config group are stored. ``packed``: in int32; else a code takes a byte.

    ``ordered``: they have a weight_g_idx.
    """

    targets: tuple[str, ...]
    packed: bool
    floating: bool
    bits: int
    symmetric: bool
    grid: ScaleGrid
    ordered: bool

    @property
    def label(self) -> str:
        """For people: int4-g128."""
        return f"{'float' if self.floating else 'int'}{self.bits}-{self.grid.label}"


@dataclass(frozen=True, slots=True)
class Groups:
    """All config groups, and what none of them has (``ignored``)."""

    groups: tuple[Group, ...]
    ignored: tuple[str, ...]

    def of(self, matrix: Matrix) -> Group | None:
        """The group that targets the matrix: by its name, then by a pattern, then by its class; None: it is dense."""
        if any(_names(one, matrix) or _is_class(one, matrix) for one in self.ignored):
            return None
        targets = {target: group for group in self.groups for target in group.targets}
        by_name = sorted(targets, key=lambda target: (_REGEX in target, target))
        for fits in (_names, _is_class):
            for target in by_name:
                if fits(target, matrix):
                    return targets[target]
        return None


def read_groups(config: ConfigFields) -> Groups:
    """The groups of a ``quantization_config``.

    Raises InvalidModel or UnsupportedFeature naming the key, its value and what is allowed.
    """
    sparsity = config.section("sparsity_config")
    if sparsity is not None and sparsity.text("format") != "dense":
        _unsupported("sparsity_config.format", sparsity.text("format"), "dense")
    if config.section("transform_config") is not None:
        _unsupported("transform_config", config.value("transform_config"), "none")
    if config.section("kv_cache_scheme") is not None:
        _log.info("kv_cache_scheme is not used: the KV cache holds the compute dtype")
    sections = config.section("config_groups")
    if sections is None:
        config.refuse("config_groups", "an object of groups")
    groups = [group for key in sections.keys() if (group := _group(sections, key, config)) is not None]  # noqa: SIM118
    patterns = config.texts("ignore") + tuple(target for group in groups for target in group.targets)
    for pattern in patterns:
        _compile(pattern)
    return Groups(tuple(groups), config.texts("ignore"))


def _group(sections: ConfigFields, key: str, config: ConfigFields) -> Group | None:
    """None for one that has no weights."""
    where = f"config_groups.{key}"
    if isinstance(sections.value(key), list):
        _unsupported(where, sections.value(key), "an object with targets and weights, not the targets of a preset")
    section = sections.section(key)
    weights = None if section is None else section.section("weights")
    if section is None or weights is None:
        return None
    stored = section.text("format", config.text("format", ""))
    if stored == MIXED:
        section.refuse("format", f"one of {', '.join(_FORMATS)}, as the whole is {MIXED}")
    if stored not in _FORMATS:
        _unsupported("format" if not section.has("format") else f"{where}.format", stored, ", ".join(_FORMATS))
    kind, bits = weights.text("type", "int").lower(), weights.integer("num_bits", 8)
    types = _FORMATS[stored]
    if kind not in types:
        _unsupported(f"{where}.weights.type", kind, f"{' or '.join(types)}, as the format is {stored}")
    if bits not in types[kind]:
        _unsupported(f"{where}.weights.num_bits", bits, f"{' or '.join(map(str, types[kind]))} as {stored} {kind}")
    if weights.value("dynamic"):
        _unsupported(f"{where}.weights.dynamic", weights.value("dynamic"), "false")
    symmetric = weights.flag("symmetric", True)
    if kind == "float" and not symmetric:
        _unsupported(f"{where}.weights.symmetric", symmetric, "true for floats")
    grid = _grid(weights, where)
    if stored == PACKED and not symmetric and grid.rows != 1:
        _unsupported(f"{where}.weights.symmetric", symmetric, f"true for {PACKED} of strategy tensor or block")
    ordered = _is_ordered(weights, where)
    if ordered and not (stored == PACKED and grid.rows == 1 and grid.cols):
        _unsupported(f"{where}.weights.actorder", weights.value("actorder"), f"weight, or strategy group of {PACKED}")
    return Group(section.texts("targets"), stored == PACKED, kind == "float", bits, symmetric, grid, ordered)


def _grid(weights: ConfigFields, where: str) -> ScaleGrid:
    size = weights.integer("group_size", -1, minimum=-1)
    inferred = "tensor" if not weights.has("group_size") else "channel" if size == -1 else "group"
    strategy = weights.text("strategy", inferred).lower()
    if strategy == "tensor":
        return TENSOR
    if strategy == "channel":
        return CHANNEL
    if strategy == "group":
        rows, cols, what, value = 1, size, "group_size", weights.value("group_size")
    elif strategy == "block":
        rows, cols, what, value = *_block(weights), "block_structure", weights.value("block_structure")
    else:
        _unsupported(f"{where}.weights.strategy", strategy, ", ".join(_STRATEGIES))
    if cols < 1 or cols % STEP_COLUMNS:
        _unsupported(f"{where}.weights.{what}", value, f"columns that are a multiple of {STEP_COLUMNS}")
    return ScaleGrid(rows, cols)


def _block(weights: ConfigFields) -> tuple[int, int]:
    """``block_structure``, [rows, columns] or "128x128"."""
    value = weights.value("block_structure")
    if isinstance(value, str) and re.fullmatch(r"[1-9]\d*x[1-9]\d*", value):
        sizes = tuple(int(size) for size in value.split("x"))
    else:
        sizes = weights.integers("block_structure")
    if len(sizes) != 2:
        weights.refuse("block_structure", "[rows, columns]")
    return sizes[0], sizes[1]


def _is_ordered(weights: ConfigFields, where: str) -> bool:
    value = weights.value("actorder")
    order = str(value).lower()
    if order not in _ORDERS:
        _unsupported(f"{where}.weights.actorder", value, ", ".join(_ORDERS))
    return _ORDERS[order]


def _names(target: str, matrix: Matrix) -> bool:
    if target.startswith(_REGEX):
        return _compile(target).match(matrix.name) is not None
    return target == matrix.name


def _is_class(target: str, matrix: Matrix) -> bool:
    """Whether it is the class of the module in transformers, or one above it."""
    embeds = matrix.end and not matrix.name.endswith("lm_head")
    return target in ("Module", "Embedding" if embeds else "Linear")


def _compile(target: str) -> re.Pattern[str]:
    pattern = target.removeprefix(_REGEX) if target.startswith(_REGEX) else ""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InvalidModel(
            f"config.json: quantization_config: {target!r} is no regular expression: {error}", field="config_groups"
        ) from error


def _unsupported(key: str, value: object, allowed: str) -> NoReturn:
    raise UnsupportedFeature(f"quantization_config.{key} is {value!r}; supported: {allowed}", field=key)
