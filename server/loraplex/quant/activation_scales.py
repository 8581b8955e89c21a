"""Tensors of checkpoints that quantize activations and KV caches too: known, and not used.

Products here are weight-only and caches hold the compute dtype, so these scales have nothing to scale.
"""

from __future__ import annotations

import logging
from math import prod
from typing import Final

import torch

from loraplex.errors import InvalidModel
from loraplex.quant.base import Expected, Matrix, WeightReader
from loraplex.quant.scale_grid import SCALE_TYPES

_log = logging.getLogger(__name__)

#: of a module's input, one for all of it
_INPUT: Final = ("input_scale", "activation_scale", "input_scale_ub")
#: projection -> its cache's scales, beside the projection or below it
_CACHE: Final = {
    "q_proj": ("q_scale",),
    "k_proj": ("k_scale", "kv_scale"),
    "v_proj": ("v_scale",),
}
_CACHE_ENDS: Final = (".q_scale", ".k_scale", ".v_scale", ".kv_scale", "_proj.output_scale")
_ZERO_TYPES: Final = (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, *SCALE_TYPES)


def activation_tensors(matrix: Matrix) -> dict[str, Expected]:
    """What may stand beside a quantized matrix for its activations and its cache; none is required."""
    layer, _, module = matrix.name.rpartition(".")
    names = {f"{matrix.name}.{name}" for name in (*_INPUT, "output_scale")}
    for name in _CACHE.get(module, ()):
        names |= {f"{layer}.{name}", f"{matrix.name}.{name}"}
    zeros = {name.removesuffix("scale") + "zero_point" for name in names if name.endswith("_scale")}
    scales = {name: Expected(None, SCALE_TYPES, required=False) for name in sorted(names)}
    return scales | {name: Expected(None, _ZERO_TYPES, required=False) for name in sorted(zeros)}


def check_activation_tensors(matrix: Matrix, reader: WeightReader) -> None:
    """Raises InvalidModel: a scale of inputs is not one number. Logs once a checkpoint that it has scales of caches."""
    keys = reader.keys()
    for name in _INPUT:
        key = f"{matrix.name}.{name}"
        if key in keys and prod(reader.shape(key)) != 1:
            raise InvalidModel(f"tensor {key!r} has shape {list(reader.shape(key))}, expected one number")
    cached = [key for key in activation_tensors(matrix) if key in keys and key.endswith(_CACHE_ENDS)]
    if cached and min(key for key in keys if key.endswith(_CACHE_ENDS)) in cached:
        _log.info("scales of the KV cache (%s, ...) are not used: the cache holds the compute dtype", cached[0])
