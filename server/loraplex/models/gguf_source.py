"""Checkpoints in one GGUF file, read through the ``gguf`` library: dequantized tensor by tensor, config from metadata.

Names, rotary order and metadata are ``gguf_convert``'s; only the seam to the loader is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loraplex.errors import ConversionFailed, InvalidModel
from loraplex.models.spec import DecoderSpec
from loraplex.quant.base import WHOLE, Placement, WeightReader

if TYPE_CHECKING:
    from loraplex.models.gguf_convert import GgufCheckpoint


class GgufSource:
    """A ``.gguf`` file, or a directory that holds exactly one."""

    def config(self, path: Path) -> dict[str, object]:
        config: dict[str, object] = _open(path).config.to_dict()
        return config

    @contextmanager
    def open(self, path: Path, spec: DecoderSpec, placement: Placement) -> Iterator[WeightReader]:
        yield GgufReader(_open(path))


class GgufReader:
    """Tensors of one mapped file under their checkpoint names; reading dequantizes to float32."""

    def __init__(self, checkpoint: GgufCheckpoint) -> None:
        self._checkpoint = checkpoint

    def keys(self) -> frozenset[str]:
        return frozenset(self._checkpoint.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._checkpoint.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return torch.float32

    def tensor(self, key: str, rows: slice = WHOLE, cols: slice = WHOLE) -> torch.Tensor:
        try:
            weight = self._checkpoint.weight(key)
        except ConversionFailed as error:
            raise InvalidModel(str(error)) from error
        # unquantized tensors are views of the read-only file, which torch must not be given
        tensor = torch.from_numpy(weight if weight.flags.writeable else weight.copy())
        return tensor[rows] if tensor.dim() == 1 else tensor[rows, cols]


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
