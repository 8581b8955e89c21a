"""Checkpoints that are written quantized: which forms there are, and which tensors then stand for a matrix.

Each is one that its own library loads as it is, and that we read again: how it lies in a file is said where it is read.
The next one is a line of ``WRITE_FORMATS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final

import torch

from loraplex.quant import at_load, bnb4, bnb8, fp8
from loraplex.quant.at_load import AtLoad
from loraplex.quant.base import Matrix
from loraplex_kernels.quant.stored import StoredMatrix
from loraplex_kernels.quant.values import Values


@dataclass(frozen=True, slots=True)
class WriteFormat:
    """One form. ``name``: that of the ``QuantFormat`` that reads it. ``tensors``: of a whole matrix in it, by name;
    without values (on torch's meta device) it gives shapes and dtypes alone. ``config``: the ``quantization_config`` of
    a checkpoint of a dtype, and the modules that are dense in it."""

    name: str
    quantizer: AtLoad
    tensors: Callable[[Matrix, StoredMatrix], Mapping[str, torch.Tensor]]
    config: Callable[[torch.dtype, Sequence[str]], dict[str, object]]

    def blank(self, matrix: Matrix, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
        """The tensors of a matrix that is ``dtype`` when it is dense: shapes and dtypes, no values."""
        shape = matrix.out_features, matrix.in_features
        return self.tensors(matrix, self.quantizer.blank(shape, dtype, "meta"))


def _nf4() -> WriteFormat:
    return WriteFormat("bitsandbytes-nf4", at_load.nf4(), bnb4.written, partial(bnb4.written_config, Values.NF4))


def _fp4() -> WriteFormat:
    return WriteFormat("bitsandbytes-fp4", at_load.fp4(), bnb4.written, partial(bnb4.written_config, Values.FP4))


def _int8() -> WriteFormat:
    return WriteFormat("bitsandbytes-int8", at_load.int8(), bnb8.written, lambda _, dense: bnb8.written_config(dense))


def _fp8() -> WriteFormat:
    blocks = at_load.fp8_blocks()
    return WriteFormat(
        "fp8-block128x128", blocks, fp8.written, lambda _, dense: fp8.written_config(blocks.scheme, dense)
    )


#: by the names that they are asked for by
WRITE_FORMATS: Final[Mapping[str, Callable[[], WriteFormat]]] = MappingProxyType(
    {"nf4": _nf4, "fp4": _fp4, "int8": _int8, "fp8": _fp8}
)
