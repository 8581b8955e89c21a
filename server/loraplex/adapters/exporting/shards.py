"""Tensors as safetensors files that are written from front to back, so that no more than one of them is in memory.

Checkpoints are cut into shards as transformers cuts them: tensors in their order, a new file where the next one would
make it larger than allowed. Knows the format alone, neither models nor adapters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import BinaryIO, Final

import torch

from loraplex.adapters.exporting.destination import write_all

INDEX: Final = "model.safetensors.index.json"
#: the format's names of the types that models and adapters are served in, and that codes are written in
_TYPES: Final = MappingProxyType(
    {
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.int8: "I8",
        torch.uint8: "U8",
    }
)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor that is to be written."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a checkpoint."""

    file: str
    tensors: tuple[TensorPlan, ...]


def in_shards(tensors: Iterable[TensorPlan], max_bytes: int) -> tuple[Shard, ...]:
    """The files of a checkpoint; a tensor larger than ``max_bytes`` has one for itself."""
    groups: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return (Shard("model.safetensors", tuple(groups[0])),)
    count = len(groups)
    names = (f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))
    return tuple(Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True))


def index_of(shards: Sequence[Shard]) -> bytes:
    """Which tensor is in which file, as ``INDEX`` says it."""
    weights = {tensor.key: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"


def header_of(tensors: Sequence[TensorPlan], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file that holds ``tensors`` one after the other."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        entries[tensor.key] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def write_tensor(file: BinaryIO, tensor: torch.Tensor, plan: TensorPlan, give_way: Callable[[], None]) -> None:
    """The next tensor of a file. ``give_way`` is called between pieces of it."""
    assert tuple(tensor.shape) == plan.shape, f"{plan.key} is {tuple(tensor.shape)}, planned was {plan.shape}"
    assert tensor.dtype is plan.dtype, f"{plan.key} is {tensor.dtype}, planned was {plan.dtype}"
    if tensor.numel():
        write_all(file, tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data, give_way)
