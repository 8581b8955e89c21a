"""A checkpoint whose modules' names begin as others spell them, read under the model's own names."""

from __future__ import annotations

import torch

from loraplex.quant.base import WHOLE, WeightReader


def renamed(reader: WeightReader, aliases: tuple[tuple[str, str], ...]) -> WeightReader:
    """``reader`` with each alias at the beginning of a name put as the model's own; itself where none is there."""
    keys = reader.keys()
    stored = {_own(key, aliases): key for key in keys}
    if all(own == key for own, key in stored.items()):
        return reader
    return _RenamedReader(reader, stored)


def _own(key: str, aliases: tuple[tuple[str, str], ...]) -> str:
    for alias, own in aliases:
        if key.startswith(alias):
            return own + key[len(alias) :]
    return key


class _RenamedReader:
    """Passes reads on (``WeightReader``)."""

    def __init__(self, reader: WeightReader, stored: dict[str, str]) -> None:
        """``stored``: own name -> the checkpoint's."""
        self._reader = reader
        self._stored = stored

    def keys(self) -> frozenset[str]:
        return frozenset(self._stored)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._reader.shape(self._stored[key])

    def dtype(self, key: str) -> torch.dtype:
        return self._reader.dtype(self._stored[key])

    def tensor(self, key: str, rows: slice = WHOLE, cols: slice = WHOLE) -> torch.Tensor:
        return self._reader.tensor(self._stored[key], rows, cols)
