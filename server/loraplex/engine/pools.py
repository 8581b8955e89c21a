"""How large a rank's pools are: pages of the key/value cache and slots of states, out of one budget; and the pools.

A running sequence needs a slot of states, of one size however long it is, and pages, which grow with it; a model may
have either or both. Slots that no sequence runs in hold snapshots for the prefix cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec
import torch

from loraplex.config import Config
from loraplex.engine.defaults import kv_bytes
from loraplex.engine.memory import require, reservable_memory
from loraplex.errors import InvalidConfig
from loraplex.models.base import BaseModel, KVSpec
from loraplex.models.footprint import Share
from loraplex_kernels.attention import AttentionBackend, KVCache
from loraplex_kernels.states import StatePool, StateShape

#: of a cache: page 0, which pads page lists, and one to write to
LEAST_PAGES: Final = 2
#: pages without memory, where one sequence needs no more: each may be an entry of the prefix index, a kilobyte of host
#: memory
_MOST_FREE_PAGES: Final = 1 << 17


class PoolSizes(msgspec.Struct, frozen=True):
    """``num_slots`` is 0 where the model has no states; pages of a model without attention take no memory."""

    num_pages: int
    num_slots: int = 0

    def least(self, other: PoolSizes) -> PoolSizes:
        """What two ranks both have room for."""
        return PoolSizes(min(self.num_pages, other.num_pages), min(self.num_slots, other.num_slots))

    def max_num_seqs(self, asked: int) -> int:
        """Sequences that may run at once: each of them has a slot of its own."""
        return min(asked, self.num_slots) if self.num_slots else asked


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes of a page, and of a slot; 0: the model has none of it."""

    page_bytes: int
    slot_bytes: int

    @property
    def least_bytes(self) -> int:
        """Of the smallest pools: one sequence on one page."""
        return LEAST_PAGES * self.page_bytes + self.slot_bytes

    @property
    def least_shares(self) -> tuple[Share, ...]:
        shares = Share(f"{LEAST_PAGES} KV pages", LEAST_PAGES * self.page_bytes), Share("1 state", self.slot_bytes)
        return tuple(share for share in shares if share.nbytes)

    def shares(self, sizes: PoolSizes) -> tuple[Share, ...]:
        """What pools of these sizes take."""
        cache, states = sizes.num_pages * self.page_bytes, sizes.num_slots * self.slot_bytes
        return tuple(share for share in (Share("KV cache", cache), Share("states", states)) if share.nbytes)


@dataclass(frozen=True, slots=True)
class Demand:
    """What could ever be used: by ``max_num_seqs`` sequences of ``pages_each`` pages, and snapshots where there is a
    prefix cache."""

    max_num_seqs: int
    pages_each: int
    prefix_cache: bool = True

    @property
    def num_pages(self) -> int:
        return self.max_num_seqs * self.pages_each + 1


def divide(budget: int, costs: Costs, demand: Demand) -> PoolSizes:
    """The largest pools that ``budget`` bytes hold and ``demand`` can use; ``budget`` holds the smallest ones.

    Running sequences come first: up to ``max_num_seqs`` slots, but where there are pages too no more than half of the
    budget. Of what is left a quarter is for snapshots; without attention all of it.
    """
    page_bytes, slot_bytes = costs.page_bytes, costs.slot_bytes
    if not slot_bytes:
        return PoolSizes(min(budget // page_bytes, demand.num_pages))
    most = min(budget // 2, budget - LEAST_PAGES * page_bytes) if page_bytes else budget
    running = min(demand.max_num_seqs, max(1, most // slot_bytes))
    left = budget - running * slot_bytes
    if page_bytes:
        for_pages = left - (left // 4 if demand.prefix_cache else 0)
        num_pages = min(max(for_pages // page_bytes, LEAST_PAGES), demand.num_pages)
        left -= num_pages * page_bytes
    else:
        num_pages = min(demand.num_pages, max(_MOST_FREE_PAGES, demand.pages_each + 1))
    snapshots = min(left // slot_bytes, num_pages - 1) if demand.prefix_cache else 0
    return PoolSizes(num_pages, running + snapshots)


def pool_sizes(config: Config, model: BaseModel, attention: AttentionBackend) -> PoolSizes:
    """What ``kv_cache_memory``, or the device's default, has room for, but no more than could ever be used.

    Raises InvalidConfig: it does not hold the smallest pools, or does not fit beside what else was promised.
    """
    engine = config.engine
    costs = costs_of(model.kv_spec(), model.state_shape(), attention, engine.kv_page_size, model.dtype)
    longest = min(config.model.max_model_len or model.max_position, model.max_position)
    demand = Demand(engine.max_num_seqs, -(-longest // engine.kv_page_size), engine.prefix_cache)
    memory = reservable_memory(model.device)
    promised = sum(share.nbytes for share in _shares_beside_weights(config, model))
    allowed = kv_bytes(engine, model.device, memory.nbytes - promised if memory else 0, config.ranks_here)
    if allowed < costs.least_bytes:
        raise InvalidConfig(_too_small(allowed, costs), field="kv_cache_memory")
    sizes = divide(allowed, costs, demand)
    _check_room_beside_weights(config, model, costs.shares(sizes))
    return sizes


def costs_of(
    kv: KVSpec | None, states: StateShape | None, attention: AttentionBackend, page_size: int, dtype: torch.dtype
) -> Costs:
    """What a rank's page and slot take."""
    page_bytes = 0
    if kv is not None:
        page_bytes = attention.page_bytes(
            num_layers=kv.num_layers, page_size=page_size, kv_heads=kv.kv_heads, head_dim=kv.head_dim, dtype=dtype
        )
    return Costs(page_bytes, 0 if states is None else states.slot_bytes(dtype))


def new_cache(model: BaseModel, attention: AttentionBackend, num_pages: int, page_size: int) -> KVCache | None:
    """Blank pages for the model's attention layers; None: it has none."""
    kv = model.kv_spec()
    if kv is None:
        return None
    return attention.new_cache(
        num_layers=kv.num_layers,
        num_pages=num_pages,
        page_size=page_size,
        kv_heads=kv.kv_heads,
        head_dim=kv.head_dim,
        dtype=model.dtype,
        device=model.device,
    )


def new_states(model: BaseModel, num_slots: int) -> StatePool | None:
    """Slots for the model's state-space layers; None: it has none."""
    shape = model.state_shape()
    return None if shape is None else StatePool(shape, num_slots, model.dtype, model.device)


def _too_small(allowed: int, costs: Costs) -> str:
    if not costs.slot_bytes:
        return (
            f"kv_cache_memory {allowed} bytes holds {allowed // costs.page_bytes} pages of {costs.page_bytes} bytes; "
            f"at least {LEAST_PAGES} are needed (--kv-cache-memory {costs.least_bytes})"
        )
    pages = f" and {LEAST_PAGES} pages of {costs.page_bytes} bytes" if costs.page_bytes else ""
    return (
        f"kv_cache_memory {allowed} bytes is too little for the states of one sequence, {costs.slot_bytes} bytes{pages}"
        f" (--kv-cache-memory {costs.least_bytes})"
    )


def _shares_beside_weights(config: Config, model: BaseModel) -> tuple[Share, ...]:
    """What a server promises beside its weights and its pools."""
    return (
        Share("adapters", config.adapters.adapter_memory),
        Share("logits", config.engine.max_num_seqs * model.vocab_size * torch.float32.itemsize),
    )


def _check_room_beside_weights(config: Config, model: BaseModel, pools: tuple[Share, ...]) -> None:
    """Refuse budgets that cannot all be kept, where memory is taken at start."""
    require(
        (*pools, *_shares_beside_weights(config, model)),
        reservable_memory(model.device),
        f"beside {model.weight_bytes >> 20:,} MiB of weights, this configuration",
        "lower --kv-cache-memory, --adapter-memory or --max-num-seqs",
    )
