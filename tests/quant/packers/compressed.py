"""compressed-tensors checkpoints, compressed and decompressed by the library itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

Tensors = dict[str, torch.Tensor]


def scheme(form: str, *, inputs: QuantizationArgs | None = None, targets: str = "Linear", **args: object):
    """Of a config group whose weights are as ``args`` say, stored as ``form``."""
    return QuantizationScheme(
        targets=[targets], weights=QuantizationArgs(**args), input_activations=inputs, format=form
    )


def compress(weight: torch.Tensor, one: QuantizationScheme) -> Tensors:
    """The tensors below a module's name; scales have the type of ``weight``."""
    args = one.weights
    low, high = _range(weight, args)
    scale, zero = calculate_qparams(low, high, args)
    state = {"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_zero_point": zero}
    return dict(BaseCompressor.get_value_from_registry(one.format).compress(state, one))


def decompress(state: Tensors, one: QuantizationScheme) -> torch.Tensor:
    """The weight, in the type of its scales."""
    kept = {key: value for key, value in state.items() if key.startswith("weight")}
    weight = BaseCompressor.get_value_from_registry(one.format).decompress(kept, one)["weight"]
    assert isinstance(weight, torch.Tensor)
    return weight


def checkpoint(one: QuantizationScheme, dtype: torch.dtype) -> Callable[[Path, Path], None]:
    """Writes a dense checkpoint with the linear modules of its layers compressed, from weights of ``dtype``."""

    def make(dense: Path, out: Path) -> None:
        shutil.copytree(dense, out)
        tensors = load_file(out / "model.safetensors")
        for key in [key for key in tensors if key.endswith("_proj.weight")]:
            name = key.removesuffix(".weight")
            tensors.update({f"{name}.{end}": part for end, part in compress(tensors.pop(key).to(dtype), one).items()})
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, out / "model.safetensors", {"format": "pt"}
        )
        path = out / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config(one)}))

    return make


def config(*schemes: QuantizationScheme, ignore: tuple[str, ...] = ("lm_head",)) -> dict[str, object]:
    """``quantization_config`` as the library writes it."""
    whole = QuantizationConfig(
        config_groups={f"group_{index}": one for index, one in enumerate(schemes)},
        format=schemes[0].format if len({one.format for one in schemes}) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=list(ignore),
    )
    return {**whole.model_dump(mode="json"), "quant_method": "compressed-tensors", "sparsity_config": {}}


def dense_of(one: QuantizationScheme) -> Callable[[Path], Tensors]:
    """Module -> its weight as the library decompresses it, in float32."""

    def dense(path: Path) -> Tensors:
        states: dict[str, Tensors] = {}
        for key, tensor in load_file(path / "model.safetensors").items():
            name, _, end = key.rpartition(".")
            if end.startswith("weight"):
                states.setdefault(name, {})[end] = tensor
        return {name: decompress(state, one).float() for name, state in states.items() if "weight_scale" in state}

    return dense


def _range(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest weight of what shares a scale, in the shape of the scales."""
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "block":
        height, width = args.block_structure
        padded = F.pad(weight, (0, -weight.shape[1] % width, 0, -weight.shape[0] % height))
        blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    size = weight.shape[1] if args.strategy == "channel" else args.group_size
    groups = weight.unflatten(1, (-1, size))
    return groups.amin(2), groups.amax(2)
