"""FP8 checkpoints as transformers and vLLM publish them, by plain arithmetic."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max

Pair = tuple[torch.Tensor, torch.Tensor]


def in_blocks(weight: torch.Tensor, size: int = BLOCK) -> Pair:
    """Codes, and a scale of every ``size`` x ``size`` of them."""
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % size, 0, -rows % size))
    blocks = padded.unflatten(1, (-1, size)).unflatten(0, (-1, size))  # [row blocks, size, column blocks, size]
    scales = blocks.abs().amax((1, 3)) / LARGEST
    codes = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    return codes.to(torch.float8_e4m3fn), scales


def by_rows(weight: torch.Tensor) -> Pair:
    scales = weight.abs().amax(1, keepdim=True) / LARGEST
    return (weight / scales).to(torch.float8_e4m3fn), scales


def whole(weight: torch.Tensor) -> Pair:
    scale = weight.abs().max() / LARGEST
    return (weight / scale).to(torch.float8_e4m3fn), scale.reshape(1)


def spread(scales: torch.Tensor, shape: torch.Size, size: int = BLOCK) -> torch.Tensor:
    """A scale for every weight."""
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(shape)
    if scales.shape[0] == shape[0]:
        return scales.reshape(-1, 1).expand(shape)
    return scales.repeat_interleave(size, 0).repeat_interleave(size, 1)[: shape[0], : shape[1]]


def checkpoint(
    pack: Callable[[torch.Tensor], Pair], scale: str, *, static: bool = False, **config: object
) -> Callable[[Path, Path], None]:
    """Writes a dense checkpoint with the linear modules of its layers in FP8, ``scale`` beside each."""

    def make(dense: Path, out: Path) -> None:
        shutil.copytree(dense, out)
        tensors = load_file(out / "model.safetensors")
        for key in [key for key in tensors if key.endswith("_proj.weight")]:
            name = key.removesuffix(".weight")
            tensors[key], tensors[f"{name}.{scale}"] = pack(tensors[key])
            if static:
                tensors[f"{name}.input_scale"] = torch.tensor(0.25)
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, out / "model.safetensors", {"format": "pt"}
        )
        path, scheme = out / "config.json", "static" if static else "dynamic"
        section = {"quant_method": "fp8", "activation_scheme": scheme, "modules_to_not_convert": ["lm_head"], **config}
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": section}))

    return make


def dense(path: Path) -> dict[str, torch.Tensor]:
    """Module -> its float32 weight."""
    tensors = load_file(path / "model.safetensors")
    found = {}
    for key, scale in tensors.items():
        name, _, end = key.rpartition(".")
        if end.startswith("weight_scale"):
            codes = tensors[f"{name}.weight"].float()
            found[name] = codes * spread(scale.float(), codes.shape)
    return found
