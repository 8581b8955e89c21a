"""Where a model runs and in which floating type: the one place that resolves ``auto``, and logs what it chose."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch

from loraplex.config import ModelConfig
from loraplex.errors import InvalidConfig
from loraplex.json_config import ConfigFields
from loraplex.quant.base import Placement

_log = logging.getLogger(__name__)

DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)


def resolve_placement(model_config: ModelConfig, config: Mapping[str, object]) -> Placement:
    """Device ``auto`` is a GPU where there is one. Dtype ``auto`` is the checkpoint's own (config.json ``dtype``, or
    ``torch_dtype``), except on a CPU: bfloat16 only where the processor multiplies it, float16 never; float32 then.

    Raises InvalidConfig for a device that is not there or a dtype we do not compute in.
    """
    device = resolve_device(model_config.device)
    fields = ConfigFields(config)
    stored = fields.text("dtype", fields.text("torch_dtype", "float32")).removeprefix("torch.")
    if model_config.dtype != "auto":
        if model_config.dtype not in DTYPES:
            raise InvalidConfig(f"dtype {model_config.dtype!r}; allowed are auto, {', '.join(DTYPES)}", field="dtype")
        name = model_config.dtype
    elif device.type == "cpu":
        name = "bfloat16" if stored == "bfloat16" and cpu_multiplies_bfloat16() else "float32"
    else:
        name = stored if stored in DTYPES else "float32"
    _log.info("model runs on %s in %s (asked: %s, checkpoint: %s)", device, name, model_config.dtype, stored)
    return Placement(device, DTYPES[name])


def cpu_multiplies_bfloat16() -> bool:
    """Whether bfloat16 products run at least as fast as float32 on this processor (AVX512-BF16 or AMX)."""
    return torch._C._has_mkldnn and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_device(name: str) -> torch.device:
    """The torch device of ``auto``, ``cpu`` or ``cuda`` (the first). Raises InvalidConfig when there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise InvalidConfig(f"device {name!r}; allowed are auto, cpu, cuda", field="device")
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidConfig("device 'cuda', but this machine or this torch has no CUDA device", field="device")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # with its index, as tensors have it: 'cuda' and 'cuda:0' are not equal
    return torch.device("cuda", torch.cuda.current_device())
