"""From a path to a loaded base model: which source it is, whether its tensors are those the config calls for, progress.

Memory: tensors are read one at a time out of mapped files into the layer they belong to, so the peak is the weights
held so far plus, for one layer at a time, its stacked matrix in plain and packed form and one checkpoint tensor. The
checkpoint is never copied as a whole; its mapped pages are the kernel's to drop, and are unmapped before this returns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol

import torch

from loraplex.config import ModelConfig
from loraplex.errors import InvalidConfig, InvalidModel, NotFound
from loraplex.json_config import ConfigFields
from loraplex.models.assemble import Materials, Runtime, assemble
from loraplex.models.base import BaseModel
from loraplex.models.dummy_source import DummySource
from loraplex.models.gguf_source import GgufSource
from loraplex.models.grains import check_grains
from loraplex.models.placement import resolve_placement
from loraplex.models.registry import read_spec
from loraplex.models.renamed import renamed
from loraplex.models.safetensors_source import SafetensorsSource
from loraplex.models.spec import DecoderSpec
from loraplex.parallel.shard import check_group
from loraplex.quant.base import WHOLE, Expected, Placement, QuantFormat, WeightReader
from loraplex.quant.dequantized import stored_format
from loraplex.quant.formats import choose_format
from loraplex.quant.loading import Storage

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called as ``progress(bytes_done, bytes_total)``, in bytes of the checkpoint; first with 0, last with the total."""

_NAMES_SHOWN: Final = 5


class CheckpointSource(Protocol):
    """One way weights come in: where its config is, and a reader of its tensors."""

    def config(self, path: Path) -> dict[str, object]:
        """What config.json says, or would say. Raises NotFound or InvalidModel."""
        ...

    def open(self, path: Path, spec: DecoderSpec, placement: Placement) -> AbstractContextManager[WeightReader]:
        """A reader that is valid inside the context. Raises InvalidModel naming the file."""
        ...


_SOURCES: Final[Mapping[str, Callable[[], CheckpointSource]]] = MappingProxyType(
    {"safetensors": SafetensorsSource, "gguf": GgufSource, "dummy": DummySource}
)


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model about to be loaded: what it is, where it goes and how it is read. No weight has been."""

    path: Path
    spec: DecoderSpec
    placement: Placement
    source: CheckpointSource
    format: QuantFormat

    def check_ranks(self, size: int) -> None:
        """Raises UnsupportedFeature: ``size`` ranks cannot share it; says what it does not divide, and what would."""
        check_group(size, (site.cut for site in self.spec.sites()))
        check_grains(size, self.spec, stored_format(self.format))


def plan_model(path: Path, model_config: ModelConfig) -> ModelPlan:
    """What loading the base model at ``path`` (a directory, or a file in a format that is one) will make.

    Raises:
        NotFound: nothing is at ``path``.
        InvalidModel: the configuration is missing or malformed.
        UnsupportedFeature: the architecture, rope scaling, activation or quantization is not one we have.
        InvalidConfig: device, dtype or load format is not one of those allowed.
    """
    source = _source(path, model_config.load_format)
    config = source.config(path)
    quant_format = choose_format(model_config.quantization, ConfigFields(config))
    return ModelPlan(path, read_spec(config), resolve_placement(model_config, config), source, quant_format)


def load_model(plan: ModelPlan, runtime: Runtime, progress: Progress) -> BaseModel:
    """Load what was planned.

    Raises InvalidModel: a file is missing or malformed; a tensor is missing, unused or misshapen, and is named.
    """
    spec, placement, path = plan.spec, plan.placement, plan.path
    with plan.source.open(path, spec, placement) as found:
        reader = renamed(found, spec.names.aliases)
        _check_tensors(plan, reader)
        counted = _CountingReader(reader, progress)
        model = assemble(Materials(spec, Storage(counted, plan.format, placement, runtime.quant), runtime))
        counted.finish()
    _log.info("loaded %s from %s: %d bytes of weights", spec.architecture, path, model.weight_bytes)
    return model


def _source(path: Path, load_format: str) -> CheckpointSource:
    if not path.exists():
        raise NotFound(f"model {str(path)!r} does not exist", field="model")
    if load_format == "auto":
        load_format = "gguf" if path.suffix == ".gguf" else "safetensors"
    if load_format not in _SOURCES:
        raise InvalidConfig(
            f"load format {load_format!r}; allowed are auto, {', '.join(_SOURCES)}", field="load_format"
        )
    return _SOURCES[load_format]()


def _check_tensors(plan: ModelPlan, reader: WeightReader) -> None:
    """Every tensor that spec and format call for is there, in its shape and type, and nothing else but what is known to
    be harmless."""
    spec, path = plan.spec, plan.path
    expected, found = _expected(plan, reader.keys()), reader.keys()
    missing = [key for key, one in expected.items() if one.required and key not in found]
    if missing:
        raise InvalidModel(f"{str(path)!r} lacks {_listed(missing)}, which {spec.architecture} needs")
    _check_scales(plan, reader)
    for key, one in expected.items():
        if key in found:
            _check_tensor(key, one, reader, path)
    unused = sorted(key for key in found if key not in expected and not _harmless(key, spec))
    if unused:
        raise InvalidModel(f"{str(path)!r} holds {_listed(unused)}, for which {spec.architecture} has no place")
    for matrix in spec.matrices().values():
        if plan.format.holds(matrix, found):
            plan.format.check(matrix, reader)
    _check_tied_head(spec, reader, path)


def _expected(plan: ModelPlan, keys: frozenset[str]) -> dict[str, Expected]:
    """The tensors of the checkpoint, those of matrices as the format has them."""
    dense = {key: Expected(shape) for key, shape in plan.spec.tensors().items()}
    for matrix in plan.spec.matrices().values():
        if plan.format.holds(matrix, keys):
            del dense[matrix.key]
            dense.update(plan.format.tensors(matrix, keys))
    return dense


def _check_scales(plan: ModelPlan, reader: WeightReader) -> None:
    """Codes whose scales are missing look dense, but for their type."""
    found = reader.keys()
    for matrix in plan.spec.matrices().values():
        if matrix.key not in found or plan.format.holds(matrix, found) or _is_float(reader.dtype(matrix.key)):
            continue
        needed = plan.format.tensors(matrix, found)
        missing = [key for key, one in needed.items() if one.required and key not in found]
        if missing:
            raise InvalidModel(
                f"{str(plan.path)!r} lacks {_listed(missing)}: {matrix.key!r} is {reader.dtype(matrix.key)}, which "
                f"{plan.format.name} has such tensors beside"
            )


def _check_tensor(key: str, expected: Expected, reader: WeightReader, path: Path) -> None:
    stored, dtype = reader.shape(key), reader.dtype(key)
    if expected.shape is not None and stored != expected.shape:
        raise InvalidModel(
            f"{str(path)!r}: tensor {key!r} has shape {list(stored)}, config.json calls for {list(expected.shape)}"
        )
    fits = dtype in expected.dtypes if expected.dtypes else _is_float(dtype)
    if not fits:
        allowed = " or ".join(str(one) for one in expected.dtypes) or "floating point"
        raise InvalidModel(f"{str(path)!r}: tensor {key!r} is {dtype}, expected {allowed}")


def _is_float(dtype: torch.dtype) -> bool:
    """Whether a tensor of this type can be a dense weight; types of 8 bits are codes."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _harmless(key: str, spec: DecoderSpec) -> bool:
    """Rotary frequencies follow from the config; a tied head's tensor is the embedding again."""
    return key.endswith(".rotary_emb.inv_freq") or (spec.tied and key == f"{spec.names.head}.weight")


def _check_tied_head(spec: DecoderSpec, reader: WeightReader, path: Path) -> None:
    head, embed = f"{spec.names.head}.weight", f"{spec.names.embed}.weight"
    if not spec.tied or not {head} <= reader.keys():
        return
    if reader.shape(head) != reader.shape(embed) or not torch.equal(reader.tensor(head), reader.tensor(embed)):
        _log.warning(
            "%s: %s differs from %s, but tie_word_embeddings is true: the embedding is used for both, as transformers"
            " does",
            path,
            head,
            embed,
        )


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return f"{', '.join(names[:_NAMES_SHOWN])}" + (f" and {more} more" if more > 0 else "")


class _CountingReader:
    """Passes reads through and reports how far the model has come."""

    def __init__(self, reader: WeightReader, progress: Progress) -> None:
        self._reader = reader
        self._progress = progress
        self._unread = {key: prod(reader.shape(key)) * reader.dtype(key).itemsize for key in sorted(reader.keys())}
        self._total = sum(self._unread.values())
        self._done = 0
        progress(0, self._total)

    def keys(self) -> frozenset[str]:
        return self._reader.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._reader.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._reader.dtype(key)

    def tensor(self, key: str, rows: slice = WHOLE, cols: slice = WHOLE) -> torch.Tensor:
        self._progress(self._done, self._total)
        tensor = self._reader.tensor(key, rows, cols)
        self._done += self._unread.pop(key, 0)
        return tensor

    def finish(self) -> None:
        """The model is whole."""
        self._progress(self._total, self._total)
