"""Builds one rank's part of an engine: backends, its part of the model, its pools, its captured graphs.

Every rank of a group goes through this in the same order, because each loads its part by itself and what they capture
speaks to the others. What was chosen is logged.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from loraplex.config import Config
from loraplex.engine.batch import Ops, StateOps
from loraplex.engine.cuda_graphs import CudaCapture
from loraplex.engine.graphs import DecodeGraphs, GraphCapture, GraphLimits, why_not
from loraplex.engine.memory import available_memory, require, taking_memory
from loraplex.engine.pools import PoolSizes, costs_of, new_cache, new_states, pool_sizes
from loraplex.engine.runner import Runner
from loraplex.engine.warm_up import warm_up
from loraplex.errors import InvalidConfig
from loraplex.models.assemble import Runtime
from loraplex.models.base import BaseModel
from loraplex.models.footprint import weight_shares
from loraplex.models.loader import ModelPlan, load_model
from loraplex.parallel.group import TPGroup
from loraplex_kernels.attention import AttentionBackend
from loraplex_kernels.backend import (
    AUTO,
    REFERENCE,
    choose_attention,
    choose_conv,
    choose_lora,
    choose_quant,
    choose_ssd,
)
from loraplex_kernels.conv import ConvBackend
from loraplex_kernels.lora import LoraBackend
from loraplex_kernels.quant import QuantBackend
from loraplex_kernels.ssd import SsdBackend

log = logging.getLogger("loraplex.engine")

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done_bytes, total_bytes)``."""

#: how often the interpreter lets the adapter loader's thread give the lock back to the step
_SWITCH_INTERVAL_S: Final = 0.0005


@dataclass(frozen=True, slots=True)
class Backends:
    """The backend of each op; of those that the model's layers do not have, the plainest."""

    lora: LoraBackend
    attention: AttentionBackend
    quant: QuantBackend
    conv: ConvBackend
    ssd: SsdBackend


@dataclass(frozen=True, slots=True)
class LoadedRank:
    """A rank whose weights are there. ``sizes``: of the pools it has room for."""

    config: Config
    model: BaseModel
    backends: Backends
    sizes: PoolSizes

    def max_model_len(self, num_pages: int) -> int:
        """Tokens that one sequence may have in a cache of ``num_pages``. Raises InvalidConfig: a limit that cannot be
        kept."""
        return _max_model_len(self.config, self.model, num_pages)


def load_rank(config: Config, plan: ModelPlan, group: TPGroup, progress: Progress) -> LoadedRank:
    """Choose backends and load this rank's weights.

    Raises a LoraplexError (InvalidModel, InvalidConfig, UnsupportedFeature, ...) for what cannot be served.
    """
    _set_threads(config.model.threads)
    backends = _backends(config, plan)
    _check_room_to_start(plan, config, backends.attention, group.size)
    # the bank keeps to the budget, but for one adapter that is squeezed in for its probe
    table_bytes = 2 * config.adapters.adapter_memory
    runtime = Runtime(
        backends.lora, backends.attention, table_bytes, group, backends.quant, backends.conv, backends.ssd
    )
    with taking_memory("loading the weights"):
        model = load_model(plan, runtime, lambda done, total: progress("weights", done, total))
    return LoadedRank(config, model, backends, pool_sizes(config, model, backends.attention))


def finish_rank(rank: LoadedRank, sizes: PoolSizes, capture: GraphCapture | None, progress: Progress) -> Runner:
    """Take pools of these sizes, run the largest step where that takes memory, capture graphs.

    ``capture``: how decode steps are captured; None is the device's own way, where it has one.
    """
    model, engine = rank.model, rank.config.engine
    ops = _ops(rank, sizes)
    limits = GraphLimits(sizes.max_num_seqs(engine.max_num_seqs), rank.max_model_len(sizes.num_pages))
    if model.device.type == "cuda":
        progress("kernels", 0, 0)
        with taking_memory("running the largest step"):
            warm_up(model, ops, num_tokens=engine.max_num_batched_tokens, num_sampled=limits.max_num_seqs)
    return Runner(model, ops, _graphs(rank, ops, limits, capture, progress))


def _ops(rank: LoadedRank, sizes: PoolSizes) -> Ops:
    """The backends over new pools."""
    model, backends, page_size = rank.model, rank.backends, rank.config.engine.kv_page_size
    with taking_memory("reserving the KV cache and states"):
        kv_cache = new_cache(model, backends.attention, sizes.num_pages, page_size)
        pool = new_states(model, sizes.num_slots)
    states = None if pool is None else StateOps(backends.conv, backends.ssd, pool)
    if pool is not None:
        log.info("states of %d sequences and snapshots, %d bytes each", pool.num_slots, pool.nbytes // pool.num_slots)
    return Ops(backends.lora, backends.attention, kv_cache, model.device, states)


def _set_threads(threads: int) -> None:
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    if threads:
        torch.set_num_threads(threads)


def _backends(config: Config, plan: ModelPlan) -> Backends:
    """What runs each op. Those of state-space layers are chosen where the model has some."""
    engine, device, dtype = config.engine, plan.placement.device, plan.placement.dtype
    has_states = plan.spec.state_shape() is not None
    try:
        lora = choose_lora(engine.lora_backend, device)
        attention = choose_attention(engine.attention_backend, device, dtype=dtype, page_size=engine.kv_page_size)
        quant = choose_quant(engine.quant_backend, device)
        conv = choose_conv(engine.conv_backend if has_states else REFERENCE, device)
        ssd = choose_ssd(engine.ssd_backend if has_states else REFERENCE, device)
    except ValueError as error:
        raise InvalidConfig(str(error)) from error
    asked = {
        f"lora {lora.name}": engine.lora_backend,
        f"attention {attention.name}": engine.attention_backend,
        f"quant {quant.name}": engine.quant_backend,
    }
    if has_states:
        asked.update({f"conv {conv.name}": engine.conv_backend, f"ssd {ssd.name}": engine.ssd_backend})
    for backend, wanted in asked.items():
        if device.type == "cuda" and wanted == AUTO and backend.endswith(f" {REFERENCE}"):
            log.warning(
                "nothing faster than %s runs on %s (is triton installed?): it is right, and slow", backend, device
            )
    return Backends(lora, attention, quant, conv, ssd)


def _check_room_to_start(plan: ModelPlan, config: Config, attention: AttentionBackend, ranks: int) -> None:
    """Refuse a model that cannot fit beside the smallest pools."""
    spec, placement = plan.spec, plan.placement
    # a GPU holds one rank's part; the CPUs of a machine share its memory, and so hold all that are on it
    parts = ranks if placement.device.type == "cuda" else config.nodes.nnodes
    costs = costs_of(
        spec.kv_spec(parts), spec.state_shape(parts), attention, config.engine.kv_page_size, placement.dtype
    )
    require(
        (*weight_shares(spec, placement, plan.format, parts), *costs.least_shares),
        available_memory(placement.device),
        f"{spec.architecture} in {str(placement.dtype).removeprefix('torch.')}",
        "serve a smaller model, in a narrower --dtype, or on another --device",
    )


def _graphs(
    rank: LoadedRank, ops: Ops, limits: GraphLimits, capture: GraphCapture | None, progress: Progress
) -> DecodeGraphs | None:
    """Captured decode graphs, where they are wanted and can be had. Refuses ``on`` where they cannot."""
    model, wanted = rank.model, rank.config.engine.graphs
    if wanted == "off":
        reason = "graphs are switched off"
    elif capture is None and model.device.type != "cuda":
        reason = f"the device is {model.device}, and only cuda has graphs"
    else:
        reason = why_not(ops)
    if not reason:
        capture = capture or CudaCapture(model.device)
        return DecodeGraphs(model, ops, limits, capture, lambda done, total: progress("graphs", done, total))
    if wanted == "on":
        raise InvalidConfig(f"graphs 'on', but {reason}; allowed here are auto, off (--graphs)", field="graphs")
    log.info("decode steps run without graphs: %s", reason)
    return None


def _max_model_len(config: Config, model: BaseModel, num_pages: int) -> int:
    """What the configuration asks for, else all the model can; never more than the cache holds for one sequence."""
    asked, room = config.model.max_model_len, (num_pages - 1) * config.engine.kv_page_size
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
