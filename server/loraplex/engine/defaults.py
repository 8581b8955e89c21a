"""Sizes that a configuration leaves to the device: the one place that resolves them, and logs what it chose."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

import msgspec
import torch

from loraplex.config import Config, EngineConfig
from loraplex.errors import InvalidConfig

log = logging.getLogger("loraplex.engine")


@dataclass(frozen=True, slots=True)
class DeviceDefaults:
    """``kv_share`` of the memory that is left beside weights, adapters and logits, or ``kv_bytes`` where it is 0."""

    max_num_batched_tokens: int
    kv_bytes: int
    kv_share: float


#: On two CPU cores a step of 512 prompt tokens stalls decodes for 0.3 to 0.7 s, one of 256 for half of that. A GPU has
#: to be given more to be busy; what the cache leaves is for activations, graphs and whoever else uses the card.
_DEFAULTS: Final = {
    "cpu": DeviceDefaults(max_num_batched_tokens=256, kv_bytes=1 << 30, kv_share=0.0),
    "cuda": DeviceDefaults(max_num_batched_tokens=2048, kv_bytes=0, kv_share=0.85),
}


def with_step_size(engine: EngineConfig, device: torch.device) -> EngineConfig:
    """The configuration with ``max_num_batched_tokens`` set: room for every sequence's decode at least."""
    if engine.max_num_batched_tokens:
        return engine
    size = max(_DEFAULTS[device.type].max_num_batched_tokens, engine.max_num_seqs)
    log.info("a step holds up to %d tokens on %s (--max-num-batched-tokens)", size, device)
    return msgspec.structs.replace(engine, max_num_batched_tokens=size)


def check_devices(config: Config, device: torch.device) -> None:
    """Raises InvalidConfig: this machine has fewer GPUs than ranks."""
    ranks = config.ranks_here
    if device.type == "cuda" and ranks > (found := torch.cuda.device_count()):
        raise InvalidConfig(
            f"tensor_parallel_size {config.model.tensor_parallel_size} puts {ranks} ranks on each machine and each "
            f"takes a GPU of its own; this machine has {found} (--tensor-parallel-size)",
            field="tensor_parallel_size",
        )


def kv_bytes(engine: EngineConfig, device: torch.device, left_bytes: int, ranks: int = 1) -> int:
    """Bytes for one rank's key/value cache. ``left_bytes``: what a device that reserves memory has left beside the
    rest; memory that is not reserved is one machine's, and its ``ranks`` share it."""
    if engine.kv_cache_memory:
        return engine.kv_cache_memory
    defaults = _DEFAULTS[device.type]
    chosen = defaults.kv_bytes // ranks or max(0, int(defaults.kv_share * left_bytes))
    log.info("up to %d MiB for the KV cache on %s (--kv-cache-memory)", chosen >> 20, device)
    return chosen
