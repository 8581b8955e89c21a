"""Puts an engine together from a configuration: resolves what is ``auto``, loads the model, sizes the pools.

The one place that knows every part's constructor. What was chosen is logged, and reported by ``ModelInfo``.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import torch

from loraplex.adapters.bank import AdapterBank
from loraplex.adapters.base_view import view_of
from loraplex.adapters.kinds.registry import KindRegistry, find_kinds
from loraplex.adapters.load import load_adapter
from loraplex.adapters.packed import PackedAdapter, pack_adapter
from loraplex.adapters.reading.source import AdapterSources
from loraplex.adapters.registry import AdapterRegistry
from loraplex.adapters.text.base_text import BaseText
from loraplex.adapters.text.own_text import OwnTexts
from loraplex.adapters.text.spool import TextSpool
from loraplex.config import Config
from loraplex.engine.batch import Ops
from loraplex.engine.core import CoreParts, EngineCore
from loraplex.engine.cuda_graphs import CudaCapture
from loraplex.engine.defaults import kv_bytes, with_step_size
from loraplex.engine.desk import AdapterDesk, SequenceSlots
from loraplex.engine.executor import Executor
from loraplex.engine.graphs import DecodeGraphs, GraphCapture, GraphLimits, why_not
from loraplex.engine.loader import AdapterLoader, LoadJob
from loraplex.engine.memory import available_memory, require, reservable_memory, taking_memory
from loraplex.engine.probe import Prober
from loraplex.engine.runner import Runner
from loraplex.engine.scheduler import Scheduler, SchedulerLimits
from loraplex.engine.trials import PROBE_SLICE_S, Trials
from loraplex.engine.warm_up import warm_up
from loraplex.errors import InvalidConfig, UnsupportedFeature
from loraplex.models.assemble import Runtime
from loraplex.models.base import BaseModel
from loraplex.models.footprint import Share, weight_shares
from loraplex.models.generation_config import eos_token_ids
from loraplex.models.loader import ModelPlan, load_model, plan_model
from loraplex.quant.base import Placement
from loraplex.state.pages import PageAllocator
from loraplex.types import ModelInfo
from loraplex_kernels.attention import AttentionBackend, KVCache
from loraplex_kernels.backend import AUTO, choose_attention, choose_lora
from loraplex_kernels.lora import LoraBackend

log = logging.getLogger("loraplex.engine")

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done_bytes, total_bytes)``."""

#: how often the interpreter lets the adapter loader's thread give the lock back to the step
_SWITCH_INTERVAL_S: Final = 0.0005
#: of a cache: page 0, which pads page lists, and one to write to
_LEAST_PAGES: Final = 2


Load = Callable[[LoadJob], PackedAdapter]
"""What the loader's thread does for a job; it may raise anything."""


@dataclass(frozen=True, slots=True)
class Means:
    """How an engine does what a server does one way, and a test or a benchmark may do another."""

    capture: GraphCapture | None = None
    """How decode steps are captured; None is the device's own way, where it has one."""
    make_load: Callable[[Config, BaseModel], Load] | None = None
    """Where adapters come from; None is the sources that the configuration allows."""
    text_spool: Path | None = None
    """Where adapters' own text is kept for front ends; None: nowhere, when there are none."""


def build_core(
    config: Config,
    model_dir: Path,
    model_id: str,
    *,
    progress: Progress,
    wake: Callable[[], None],
    means: Means | None = None,
) -> EngineCore:
    """An engine ready to serve. ``wake`` is called from the loader's thread when a turn is due.

    Raises a LoraplexError (InvalidModel, InvalidConfig, UnsupportedFeature, ...) for what cannot be served.
    """
    means = means or Means()
    _check_adapter_dirs(config)
    kinds = find_kinds()
    _set_threads(config.model.threads)
    plan = plan_model(model_dir, config.model)
    config = msgspec.structs.replace(config, engine=with_step_size(config.engine, plan.placement.device))
    limits = _limits(config)
    lora, attention = _backends(config, plan.placement)
    _check_room_to_start(plan, config, attention)
    # the bank keeps to the budget, but for one adapter that is squeezed in for its probe
    runtime = Runtime(lora, attention, 2 * config.adapters.adapter_memory)
    with taking_memory("loading the weights"):
        model = load_model(plan, runtime, lambda done, total: progress("weights", done, total))
    with taking_memory("reserving the KV cache"):
        kv_cache = _kv_cache(config, model, attention)
    ops = Ops(lora, attention, kv_cache, model.device)
    if model.device.type == "cuda":
        progress("kernels", 0, 0)
        with taking_memory("running the largest step"):
            warm_up(model, ops, num_tokens=limits.max_num_batched_tokens, num_sampled=limits.max_num_seqs)
    graphs = _graphs(config, model, ops, means.capture, progress)
    eos = eos_token_ids(model_dir)
    backends = {"lora": lora.name, "attention": attention.name, "graphs": "on" if graphs else "off"}
    info = _model_info(config, model, kv_cache, model_id, eos, backends)
    prober = Prober(model, ops)
    prober.warm_up()
    bank = AdapterBank(lora.fence, config.adapters.adapter_memory)
    spool = TextSpool(means.text_spool)
    texts = OwnTexts(BaseText.read(model_dir, eos), allow_templates=config.adapters.allow_templates)
    make_load = means.make_load or partial(_load_from_sources, kinds, texts, spool)
    desk = AdapterDesk(
        AdapterRegistry(bank.residency),
        bank,
        AdapterLoader(make_load(config, model), wake),
        # a device works through a whole probe by itself: slices would only make the host wait more often
        Trials(bank, prober.pieces, slice_s=PROBE_SLICE_S if model.device.type == "cpu" else math.inf),
        spool,
        info,
    )
    pages = PageAllocator(kv_cache.num_pages, kv_cache.page_size, prefix_cache=config.engine.prefix_cache)
    scheduler = Scheduler(limits, pages, SequenceSlots(desk))
    log.info("serving %s; %s", model_id, ", ".join(f"{what} {name}" for what, name in backends.items()))
    return EngineCore(CoreParts(Executor(Runner(model, ops, graphs)), scheduler, desk, info))


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


def _backends(config: Config, placement: Placement) -> tuple[LoraBackend, AttentionBackend]:
    engine, device = config.engine, placement.device
    try:
        lora = choose_lora(engine.lora_backend, device)
        attention = choose_attention(
            engine.attention_backend, device, dtype=placement.dtype, page_size=engine.kv_page_size
        )
    except ValueError as error:
        raise InvalidConfig(str(error)) from error
    asked = {f"lora {lora.name}": engine.lora_backend, f"attention {attention.name}": engine.attention_backend}
    for backend, wanted in asked.items():
        if device.type == "cuda" and wanted == AUTO and backend.endswith(" reference"):
            log.warning(
                "nothing faster than %s runs on %s (is triton installed?): it is right, and slow", backend, device
            )
    return lora, attention


def _check_room_to_start(plan: ModelPlan, config: Config, attention: AttentionBackend) -> None:
    """Refuse a model that cannot fit beside the smallest cache."""
    spec, placement = plan.spec, plan.placement
    page_bytes = attention.page_bytes(
        num_layers=spec.num_layers,
        page_size=config.engine.kv_page_size,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=placement.dtype,
    )
    require(
        (*weight_shares(spec, placement), Share(f"{_LEAST_PAGES} KV pages", _LEAST_PAGES * page_bytes)),
        available_memory(placement.device),
        f"{spec.architecture} in {str(placement.dtype).removeprefix('torch.')}",
        "serve a smaller model, in a narrower --dtype, or on another --device",
    )


def _shares_beside_weights(config: Config, model: BaseModel) -> tuple[Share, ...]:
    """What a server promises beside its weights and its cache."""
    return (
        Share("adapters", config.adapters.adapter_memory),
        Share("logits", config.engine.max_num_seqs * model.vocab_size * torch.float32.itemsize),
    )


def _check_room_beside_weights(config: Config, model: BaseModel, cache_bytes: int) -> None:
    """Refuse budgets that cannot all be kept, where memory is taken at start."""
    require(
        (Share("KV cache", cache_bytes), *_shares_beside_weights(config, model)),
        reservable_memory(model.device),
        f"beside {model.weight_bytes >> 20:,} MiB of weights, this configuration",
        "lower --kv-cache-memory, --adapter-memory or --max-num-seqs",
    )


def _kv_cache(config: Config, model: BaseModel, attention: AttentionBackend) -> KVCache:
    """As many pages as ``kv_cache_memory``, or the device's default, holds, but no more than could ever be used."""
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
    memory = reservable_memory(model.device)
    promised = sum(share.nbytes for share in _shares_beside_weights(config, model))
    allowed = kv_bytes(engine, model.device, memory.nbytes - promised if memory else 0)
    num_pages = min(allowed // page_bytes, useful)
    if num_pages < _LEAST_PAGES:
        raise InvalidConfig(
            f"kv_cache_memory {allowed} bytes holds {num_pages} pages of {page_bytes} bytes; "
            f"at least {_LEAST_PAGES} are needed (--kv-cache-memory {_LEAST_PAGES * page_bytes})",
            field="kv_cache_memory",
        )
    _check_room_beside_weights(config, model, num_pages * page_bytes)
    return attention.new_cache(
        num_layers=spec.num_layers,
        num_pages=num_pages,
        page_size=engine.kv_page_size,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=model.dtype,
        device=model.device,
    )


def _graphs(
    config: Config, model: BaseModel, ops: Ops, capture: GraphCapture | None, progress: Progress
) -> DecodeGraphs | None:
    """Captured decode graphs, where they are wanted and can be had. Refuses ``on`` where they cannot."""
    wanted = config.engine.graphs
    if wanted == "off":
        reason = "graphs are switched off"
    elif capture is None and model.device.type != "cuda":
        reason = f"the device is {model.device}, and only cuda has graphs"
    else:
        reason = why_not(ops)
    if not reason:
        limits = GraphLimits(config.engine.max_num_seqs, _max_model_len(config, model, ops.kv_cache))
        capture = capture or CudaCapture(model.device)
        return DecodeGraphs(model, ops, limits, capture, lambda done, total: progress("graphs", done, total))
    if wanted == "on":
        raise InvalidConfig(f"graphs 'on', but {reason}; allowed here are auto, off (--graphs)", field="graphs")
    log.info("decode steps run without graphs: %s", reason)
    return None


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


def _load_from_sources(
    kinds: KindRegistry, texts: OwnTexts, spool: TextSpool, config: Config, model: BaseModel
) -> Load:
    sources = AdapterSources.from_config(config.adapters)
    base = view_of(model)
    tables = model.tables()

    def load(job: LoadJob) -> PackedAdapter:
        directory, max_bytes = sources.resolve(job.source), config.adapters.max_adapter_bytes
        found = load_adapter(directory, base, max_bytes=max_bytes, kinds=kinds, texts=texts)
        return replace(pack_adapter(found, tables, base, max_bytes=max_bytes), text_file=spool.write(found.text))

    return load
