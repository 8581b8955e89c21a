"""What an object really keeps in memory: every tensor that can be reached from it, by the storage behind it."""

from __future__ import annotations

import gc
from types import BuiltinFunctionType, FunctionType, ModuleType

import torch
from torch._ops import OpOverload

_NOBODYS = (type, ModuleType, FunctionType, BuiltinFunctionType, OpOverload)


def held_bytes(root: object) -> int:
    """Bytes of the storages of all tensors below ``root``, each once: a view of a large tensor counts as that tensor.

    Follows attributes, containers and bound methods, and neither modules nor classes.
    """
    sizes: dict[object, int] = {}
    seen, waiting = {id(root)}, [root]
    while waiting:
        found = waiting.pop()
        if isinstance(found, torch.Tensor):
            key, nbytes = _storage(found)
            sizes[key] = nbytes
            continue
        for referent in gc.get_referents(found):
            if id(referent) not in seen and not isinstance(referent, _NOBODYS):
                seen.add(id(referent))
                waiting.append(referent)
    return sum(sizes.values())


def _storage(tensor: torch.Tensor) -> tuple[object, int]:
    if tensor.layout is torch._mkldnn:  # type: ignore[attr-defined]
        return ("packed", id(tensor)), int(torch.ops.mkldnn._nbytes(tensor))
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
