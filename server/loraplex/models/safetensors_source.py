"""Checkpoints in safetensors, one file or sharded with an index; tensors are views of the mapped files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from loraplex.errors import InvalidModel
from loraplex.json_config import read_config, read_json_object
from loraplex.models.spec import DecoderSpec
from loraplex.quant.base import WHOLE, Placement, WeightReader

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
MAX_INDEX_BYTES: Final = 64 << 20
#: safetensors' names of types
_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsSource:
    """A directory with config.json and safetensors files."""

    def config(self, path: Path) -> dict[str, object]:
        return read_config(path)

    @contextmanager
    def open(self, path: Path, spec: DecoderSpec, placement: Placement) -> Iterator[WeightReader]:
        """Map the files; they are unmapped on leaving, once nothing views them.

        Raises InvalidModel naming the file that is missing, truncated, malformed, or lacks what the index promises.
        """
        with ExitStack() as stack:
            yield SafetensorsReader({name: _map(path / name, stack) for name in _file_names(path)}, path)


class SafetensorsReader:
    """Tensors of one or several mapped files, by name."""

    def __init__(self, files: Mapping[str, Any], path: Path) -> None:
        self._files = files
        self._path = path
        self._where: dict[str, str] = {}
        for name, file in files.items():
            for key in file.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                if key in self._where:
                    raise InvalidModel(f"tensor {key!r} stands in {self._where[key]!r} and again in {name!r}")
                self._where[key] = name
        self._keys = frozenset(self._where)

    def keys(self) -> frozenset[str]:
        return self._keys

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._files[self._where[key]].get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        name = self._files[self._where[key]].get_slice(key).get_dtype()
        if name not in _DTYPES:
            raise InvalidModel(
                f"{str(self._path / self._where[key])!r}: tensor {key!r} is {name}, allowed are {', '.join(_DTYPES)}"
            )
        return _DTYPES[name]

    def tensor(self, key: str, rows: slice = WHOLE, cols: slice = WHOLE) -> torch.Tensor:
        name = self._where[key]
        try:
            tensor: torch.Tensor = self._files[name].get_tensor(key)
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise InvalidModel(f"{str(self._path / name)!r}: tensor {key!r} cannot be read: {error}") from error
        if tensor.dim() == 0:
            return tensor
        return tensor[rows, cols] if tensor.dim() == 2 else tensor[rows]


def _file_names(path: Path) -> tuple[str, ...]:
    if (path / INDEX).is_file():
        return _indexed(path)
    if (path / SINGLE).is_file():
        return (SINGLE,)
    raise InvalidModel(f"{str(path)!r} holds neither {SINGLE} nor {INDEX}")


def _indexed(path: Path) -> tuple[str, ...]:
    weight_map = read_json_object(path / INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidModel(f"{str(path / INDEX)!r}: weight_map is missing or empty")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InvalidModel(f"{str(path / INDEX)!r}: {name!r} is not the name of a safetensors file beside it")
    return tuple(names)


def _map(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise InvalidModel(f"{str(path)!r} is not a whole safetensors file: {error}") from error
