"""Checkpoints in one GGUF file, read through the ``gguf`` library: matrices as the blocks they are in, all else dense.

A matrix of a block type that we multiply by (``quant.gguf``) stands under a key that names its type; a tensor of any
other is dequantized when it is read, and stands under its checkpoint name. Names, rotary order and metadata are
``gguf_convert``'s; only the seam to the loader is here.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from loraplex.errors import ConversionFailed, InvalidModel
from loraplex.models.spec import DecoderSpec
from loraplex.quant.base import WHOLE, Placement, WeightReader
from loraplex.quant.gguf import BLOCK_TYPES, blocks_key, config_of

if TYPE_CHECKING:
    from loraplex.models.gguf_convert import GgufCheckpoint

_log = logging.getLogger(__name__)

#: types that are numbers as they are
_DENSE_TYPES: Final = ("F32", "F16", "BF16")
_WEIGHT: Final = ".weight"


class GgufSource:
    """A ``.gguf`` file, or a directory that holds exactly one.

    Each plan has its own: a header that was read for its config (seconds, where the vocabulary is large) is kept until
    the file is opened for its weights.
    """

    def __init__(self) -> None:
        self._read: dict[Path, GgufCheckpoint] = {}

    def config(self, path: Path) -> dict[str, object]:
        """With a ``quantization_config`` where the file has blocks that are served as they are."""
        checkpoint = self._read[path] = _open(path)
        config: dict[str, object] = checkpoint.config.to_dict()
        kinds = _kinds(checkpoint)
        if kinds:
            weights: Counter[str] = Counter()
            for module, kind in kinds.items():
                weights[kind] += prod(checkpoint.shape(f"{module}{_WEIGHT}"))
            config["quantization_config"] = config_of(kinds, main=weights.most_common(1)[0][0])
        return config

    @contextmanager
    def open(self, path: Path, spec: DecoderSpec, placement: Placement) -> Iterator[WeightReader]:
        checkpoint = self._read.pop(path, None) or _open(path)
        others = Counter(
            kind
            for name in checkpoint.tensors
            if (kind := checkpoint.kind(name)) not in _DENSE_TYPES and not _in_blocks(checkpoint, name)
        )
        if others:
            counts = ", ".join(f"{count} of {kind}" for kind, count in sorted(others.items()))
            _log.warning("%s: tensors that are dequantized, and take the memory of dense ones: %s", path, counts)
        yield GgufReader(checkpoint)


class GgufReader:
    """Tensors of one mapped file: blocks as bytes, dense ones in float32."""

    def __init__(self, checkpoint: GgufCheckpoint) -> None:
        self._checkpoint = checkpoint
        kinds = _kinds(checkpoint)
        self._blocks = {blocks_key(module, kind): f"{module}{_WEIGHT}" for module, kind in kinds.items()}
        self._keys = frozenset(checkpoint.tensors) - frozenset(self._blocks.values()) | frozenset(self._blocks)

    def keys(self) -> frozenset[str]:
        return self._keys

    def shape(self, key: str) -> tuple[int, ...]:
        if key in self._blocks:
            return tuple(self._checkpoint.tensors[self._blocks[key]].data.shape)
        return self._checkpoint.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return torch.uint8 if key in self._blocks else torch.float32

    def tensor(self, key: str, rows: slice = WHOLE, cols: slice = WHOLE) -> torch.Tensor:
        if key in self._blocks:
            # the file is read-only, which torch must not be given
            return torch.from_numpy(self._checkpoint.blocks(self._blocks[key])[rows, cols].copy())
        try:
            weight = self._checkpoint.weight(key)
        except ConversionFailed as error:
            raise InvalidModel(str(error)) from error
        # unquantized tensors are views of the read-only file
        tensor = torch.from_numpy(weight if weight.flags.writeable else weight.copy())
        return tensor[rows] if tensor.dim() == 1 else tensor[rows, cols]


def _kinds(checkpoint: GgufCheckpoint) -> dict[str, str]:
    """Module -> block type, of matrices that are served in their blocks."""
    return {
        name.removesuffix(_WEIGHT): checkpoint.kind(name) for name in checkpoint.tensors if _in_blocks(checkpoint, name)
    }


def _in_blocks(checkpoint: GgufCheckpoint, name: str) -> bool:
    return checkpoint.kind(name) in BLOCK_TYPES and len(checkpoint.shape(name)) == 2 and name.endswith(_WEIGHT)


def _open(path: Path) -> GgufCheckpoint:
    # imported when a GGUF file is asked for: gguf and transformers take seconds that other formats need not wait
    from loraplex.models.gguf_convert import open_gguf

    try:
        return open_gguf(_file(path))
    except ConversionFailed as error:
        raise InvalidModel(str(error)) from error
    except OSError as error:
        raise InvalidModel(f"{str(path)!r} cannot be read: {error}") from error


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise InvalidModel(f"{str(path)!r} should hold exactly one .gguf file; it holds {names}")
    return files[0]
