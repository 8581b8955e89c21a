"""Puts an engine together from a configuration: resolves what is ``auto``, loads the model, sizes the pools.

The one place that knows every part's constructor. What was chosen is logged, and reported by ``ModelInfo``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from loraplex.adapters.bank import AdapterBank
from loraplex.adapters.base_view import BaseView
from loraplex.adapters.load import load_adapter
from loraplex.adapters.packed import PackedAdapter, pack_adapter
from loraplex.adapters.registry import AdapterRegistry
from loraplex.adapters.source import AdapterSources
from loraplex.config import Config
from loraplex.engine.batch import Ops
from loraplex.engine.core import CoreParts, EngineCore
from loraplex.engine.desk import AdapterDesk, SequenceSlots
from loraplex.engine.loader import AdapterLoader, LoadJob
from loraplex.engine.runner import Runner
from loraplex.engine.scheduler import Scheduler, SchedulerLimits
from loraplex.errors import InvalidConfig, UnsupportedFeature
from loraplex.models.assemble import Runtime
from loraplex.models.base import BaseModel
from loraplex.models.generation_config import eos_token_ids
from loraplex.models.loader import load_model
from loraplex.models.placement import resolve_device
from loraplex.state.pages import PageAllocator
from loraplex.types import ModelInfo
from loraplex_kernels.attention import AttentionBackend, KVCache
from loraplex_kernels.backend import choose_attention, choose_lora
from loraplex_kernels.lora import LoraBackend

log = logging.getLogger("loraplex.engine")

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done_bytes, total_bytes)``."""

#: how often the interpreter lets the adapter loader's thread give the lock back to the step
_SWITCH_INTERVAL_S: Final = 0.0005


def build_core(
    config: Config, model_dir: Path, model_id: str, *, progress: Progress, wake: Callable[[], None]
) -> EngineCore:
    """An engine ready to serve. ``wake`` is called from the loader's thread when a turn is due.

    Raises a LoraplexError (InvalidModel, InvalidConfig, UnsupportedFeature, ...) for what cannot be served.
    """
    limits = _limits(config)
    _check_adapter_dirs(config)
    _set_threads(config.model.threads)
    lora, attention = _backends(config)
    runtime = Runtime(lora, attention, config.adapters.adapter_memory)
    model = load_model(model_dir, config.model, runtime, lambda done, total: progress("weights", done, total))
    kv_cache = _kv_cache(config, model, attention)
    eos = eos_token_ids(model_dir)
    info = _model_info(config, model, kv_cache, model_id, eos, {"lora": lora.name, "attention": attention.name})
    bank = AdapterBank(lora.fence, config.adapters.adapter_memory)
    desk = AdapterDesk(AdapterRegistry(bank.residency), bank, AdapterLoader(_load_function(config, model), wake))
    pages = PageAllocator(kv_cache.num_pages, kv_cache.page_size, prefix_cache=config.engine.prefix_cache)
    scheduler = Scheduler(limits, pages, SequenceSlots(desk))
    runner = Runner(model, Ops(lora, attention, kv_cache, model.device), eos)
    log.info("serving %s; backends: lora %s, attention %s", model_id, lora.name, attention.name)
    return EngineCore(CoreParts(runner, scheduler, desk, info))


def _limits(config: Config) -> SchedulerLimits:
    """What a step may hold. Refuses what cannot be served, before any weight is read."""
    engine, ranks = config.engine, config.model.tensor_parallel_size
    if ranks != 1:
        raise UnsupportedFeature(
            f"tensor_parallel_size {ranks} is not built yet; allowed is 1", field="tensor_parallel_size"
        )
    if engine.max_num_batched_tokens < engine.max_num_seqs:
        raise InvalidConfig(
            f"max_num_batched_tokens {engine.max_num_batched_tokens} is less than max_num_seqs {engine.max_num_seqs}: "
            f"not every running sequence could decode in a step",
            field="max_num_batched_tokens",
        )
    return SchedulerLimits(engine.max_num_seqs, engine.max_num_batched_tokens, engine.max_waiting)


def _check_adapter_dirs(config: Config) -> None:
    for path in config.adapters.adapter_dirs:
        if not Path(path).is_dir():
            raise InvalidConfig(f"adapter_dirs: {path!r} is not a directory (--adapter-dir)", field="adapter_dirs")


def _set_threads(threads: int) -> None:
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    if threads:
        torch.set_num_threads(threads)


def _backends(config: Config) -> tuple[LoraBackend, AttentionBackend]:
    device = resolve_device(config.model.device)
    try:
        return (
            choose_lora(config.engine.lora_backend, device),
            choose_attention(config.engine.attention_backend, device),
        )
    except ValueError as error:
        raise InvalidConfig(str(error)) from error


def _kv_cache(config: Config, model: BaseModel, attention: AttentionBackend) -> KVCache:
    """As many pages as ``kv_cache_memory`` holds, but no more than ``max_num_seqs`` sequences could ever use."""
    spec, engine = model.kv_spec(), config.engine
    page_bytes = attention.page_bytes(
        num_layers=spec.num_layers,
        page_size=engine.kv_page_size,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=model.dtype,
    )
    longest = min(config.model.max_model_len or model.max_position, model.max_position)
    useful = engine.max_num_seqs * -(-longest // engine.kv_page_size) + 1
    num_pages = min(engine.kv_cache_memory // page_bytes, useful)
    if num_pages < 2:
        raise InvalidConfig(
            f"kv_cache_memory {engine.kv_cache_memory} bytes holds {num_pages} pages of {page_bytes} bytes; "
            f"at least 2 are needed (--kv-cache-memory {2 * page_bytes})",
            field="kv_cache_memory",
        )
    return attention.new_cache(
        num_layers=spec.num_layers,
        num_pages=num_pages,
        page_size=engine.kv_page_size,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=model.dtype,
        device=model.device,
    )


def _max_model_len(config: Config, model: BaseModel, kv_cache: KVCache) -> int:
    """What the configuration asks for, else all the model can; never more than the cache holds for one sequence."""
    asked, room = config.model.max_model_len, (kv_cache.num_pages - 1) * kv_cache.page_size
    if asked == 1:
        raise InvalidConfig("max_model_len 1 has no room for a prompt and an answer; at least 2", field="max_model_len")
    if asked > model.max_position:
        raise InvalidConfig(
            f"max_model_len {asked} is more than the model's {model.max_position} positions", field="max_model_len"
        )
    if asked > room:
        raise InvalidConfig(
            f"max_model_len {asked} needs {asked} cached tokens, kv_cache_memory holds {room}", field="max_model_len"
        )
    return asked or min(model.max_position, room)


def _model_info(
    config: Config,
    model: BaseModel,
    kv_cache: KVCache,
    model_id: str,
    eos: tuple[int, ...],
    backends: dict[str, str],
) -> ModelInfo:
    return ModelInfo(
        model_id=model_id,
        architecture=model.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        quantization=config.model.quantization or "none",
        tensor_parallel_size=config.model.tensor_parallel_size,
        vocab_size=model.vocab_size,
        max_model_len=_max_model_len(config, model, kv_cache),
        eos_token_ids=eos,
        sites=tuple(dict.fromkeys(site.module for site in model.sites())),
        backends=backends,
        max_num_seqs=config.engine.max_num_seqs,
        max_num_batched_tokens=config.engine.max_num_batched_tokens,
        kv_page_size=kv_cache.page_size,
        kv_num_pages=kv_cache.num_pages,
        adapter_memory_bytes=config.adapters.adapter_memory,
        weight_bytes=model.weight_bytes,
    )


def _load_function(config: Config, model: BaseModel) -> Callable[[LoadJob], PackedAdapter]:
    sources = AdapterSources.from_config(config.adapters)
    base = BaseView(model.sites(), model.dtype, model.dense_weight)
    tables = model.tables()

    def load(job: LoadJob) -> PackedAdapter:
        found = load_adapter(sources.resolve(job.source), base, max_bytes=config.adapters.max_adapter_bytes)
        return pack_adapter(found, tables)

    return load
