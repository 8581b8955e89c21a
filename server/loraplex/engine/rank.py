"""Builds one rank's part of an engine: backends, its part of the model, its cache, its captured graphs.

Every rank of a group goes through this in the same order, because each loads its part by itself and what they capture
speaks to the others. What was chosen is logged.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypedDict

import torch

from loraplex.config import Config
from loraplex.engine.batch import Ops
from loraplex.engine.cuda_graphs import CudaCapture
from loraplex.engine.defaults import kv_bytes
from loraplex.engine.graphs import DecodeGraphs, GraphCapture, GraphLimits, why_not
from loraplex.engine.memory import available_memory, require, reservable_memory, taking_memory
from loraplex.engine.runner import Runner
from loraplex.engine.warm_up import warm_up
from loraplex.errors import InvalidConfig
from loraplex.models.assemble import Runtime
from loraplex.models.base import BaseModel
from loraplex.models.footprint import Share, weight_shares
from loraplex.models.loader import ModelPlan, load_model
from loraplex.parallel.group import TPGroup
from loraplex.quant.base import Placement
from loraplex_kernels.attention import AttentionBackend, KVCache
from loraplex_kernels.backend import AUTO, choose_attention, choose_lora, choose_quant
from loraplex_kernels.lora import LoraBackend
from loraplex_kernels.quant import QuantBackend

log = logging.getLogger("loraplex.engine")

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done_bytes, total_bytes)``."""

#: how often the interpreter lets the adapter loader's thread give the lock back to the step
_SWITCH_INTERVAL_S: Final = 0.0005
#: of a cache: page 0, which pads page lists, and one to write to
_LEAST_PAGES: Final = 2


@dataclass(frozen=True, slots=True)
class Backends:
    """The backend of each op."""

    lora: LoraBackend
    attention: AttentionBackend
    quant: QuantBackend


@dataclass(frozen=True, slots=True)
class LoadedRank:
    """A rank whose weights are there. ``num_pages``: of the cache it has room for."""

    config: Config
    model: BaseModel
    backends: Backends
    num_pages: int

    def max_model_len(self, num_pages: int) -> int:
        """Tokens that one sequence may have in a cache of ``num_pages``. Raises InvalidConfig: a limit that cannot be
        kept."""
        return _max_model_len(self.config, self.model, num_pages)


def load_rank(config: Config, plan: ModelPlan, group: TPGroup, progress: Progress) -> LoadedRank:
    """Choose backends and load this rank's weights.

    Raises a LoraplexError (InvalidModel, InvalidConfig, UnsupportedFeature, ...) for what cannot be served.
    """
    _set_threads(config.model.threads)
    backends = _backends(config, plan.placement)
    _check_room_to_start(plan, config, backends.attention, group.size)
    # the bank keeps to the budget, but for one adapter that is squeezed in for its probe
    table_bytes = 2 * config.adapters.adapter_memory
    runtime = Runtime(backends.lora, backends.attention, table_bytes, group, backends.quant)
    with taking_memory("loading the weights"):
        model = load_model(plan, runtime, lambda done, total: progress("weights", done, total))
    return LoadedRank(config, model, backends, _num_pages(config, model, backends.attention))


def finish_rank(rank: LoadedRank, num_pages: int, capture: GraphCapture | None, progress: Progress) -> Runner:
    """Take a cache of ``num_pages``, run the largest step where that takes memory, capture graphs.

    ``capture``: how decode steps are captured; None is the device's own way, where it has one.
    """
    config, model = rank.config, rank.model
    with taking_memory("reserving the KV cache"):
        kv_cache = _new_cache(config, model, rank.backends.attention, num_pages)
    ops = Ops(rank.backends.lora, rank.backends.attention, kv_cache, model.device)
    engine = config.engine
    if model.device.type == "cuda":
        progress("kernels", 0, 0)
        with taking_memory("running the largest step"):
            warm_up(model, ops, num_tokens=engine.max_num_batched_tokens, num_sampled=engine.max_num_seqs)
    return Runner(model, ops, _graphs(config, model, ops, capture, progress))


def _set_threads(threads: int) -> None:
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    if threads:
        torch.set_num_threads(threads)


def _backends(config: Config, placement: Placement) -> Backends:
    engine, device = config.engine, placement.device
    try:
        lora = choose_lora(engine.lora_backend, device)
        attention = choose_attention(
            engine.attention_backend, device, dtype=placement.dtype, page_size=engine.kv_page_size
        )
        quant = choose_quant(engine.quant_backend, device)
    except ValueError as error:
        raise InvalidConfig(str(error)) from error
    asked = {
        f"lora {lora.name}": engine.lora_backend,
        f"attention {attention.name}": engine.attention_backend,
        f"quant {quant.name}": engine.quant_backend,
    }
    for backend, wanted in asked.items():
        if device.type == "cuda" and wanted == AUTO and backend.endswith(" reference"):
            log.warning(
                "nothing faster than %s runs on %s (is triton installed?): it is right, and slow", backend, device
            )
    return Backends(lora, attention, quant)


def _check_room_to_start(plan: ModelPlan, config: Config, attention: AttentionBackend, ranks: int) -> None:
    """Refuse a model that cannot fit beside the smallest cache."""
    spec, placement = plan.spec, plan.placement
    # a GPU holds one rank's part; the CPUs of a machine share its memory, and so hold all that are on it
    parts = ranks if placement.device.type == "cuda" else config.nodes.nnodes
    kv = spec.kv_spec(parts)
    page_bytes = 0
    if kv is not None:
        page_bytes = attention.page_bytes(
            num_layers=kv.num_layers,
            page_size=config.engine.kv_page_size,
            kv_heads=kv.kv_heads,
            head_dim=kv.head_dim,
            dtype=placement.dtype,
        )
    require(
        (
            *weight_shares(spec, placement, plan.format, parts),
            Share(f"{_LEAST_PAGES} KV pages", _LEAST_PAGES * page_bytes),
        ),
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


def _num_pages(config: Config, model: BaseModel, attention: AttentionBackend) -> int:
    """As many pages as ``kv_cache_memory``, or the device's default, holds, but no more than could ever be used."""
    engine = config.engine
    page_bytes = attention.page_bytes(**_page_shape(config, model))
    longest = min(config.model.max_model_len or model.max_position, model.max_position)
    useful = engine.max_num_seqs * -(-longest // engine.kv_page_size) + 1
    memory = reservable_memory(model.device)
    promised = sum(share.nbytes for share in _shares_beside_weights(config, model))
    allowed = kv_bytes(engine, model.device, memory.nbytes - promised if memory else 0, config.ranks_here)
    num_pages = min(allowed // page_bytes, useful)
    if num_pages < _LEAST_PAGES:
        raise InvalidConfig(
            f"kv_cache_memory {allowed} bytes holds {num_pages} pages of {page_bytes} bytes; "
            f"at least {_LEAST_PAGES} are needed (--kv-cache-memory {_LEAST_PAGES * page_bytes})",
            field="kv_cache_memory",
        )
    _check_room_beside_weights(config, model, num_pages * page_bytes)
    return num_pages


def _new_cache(config: Config, model: BaseModel, attention: AttentionBackend, num_pages: int) -> KVCache:
    return attention.new_cache(num_pages=num_pages, device=model.device, **_page_shape(config, model))


class _PageShape(TypedDict):
    num_layers: int
    page_size: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


def _page_shape(config: Config, model: BaseModel) -> _PageShape:
    spec = model.kv_spec()
    return {
        "num_layers": spec.num_layers,
        "page_size": config.engine.kv_page_size,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "dtype": model.dtype,
    }


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
        limits = GraphLimits(config.engine.max_num_seqs, _max_model_len(config, model, ops.kv_cache.num_pages))
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
