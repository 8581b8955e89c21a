"""What the other ranks of a group are to the first one: somebody to tell, to wait for, and to give shares to.

``Alone`` is a normal case of it, and no special one: a server without tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from loraplex.adapters.base_view import BaseView, view_of
from loraplex.adapters.delta import AdapterDelta
from loraplex.adapters.folding import check_foldable, fold_sites, folded_facts
from loraplex.adapters.packed import PackedAdapter, footprint_of, pack_adapter
from loraplex.engine.pools import PoolSizes
from loraplex.engine.ranks.orders import Order
from loraplex.errors import GroupLost
from loraplex.models.base import BaseModel
from loraplex.parallel.group import TPGroup, solo
from loraplex_kernels.lora.slots import SlotBook


class Packer(Protocol):
    """Lays lowered adapters out, for all ranks. Called by the adapter loader's thread alone."""

    @property
    def base(self) -> BaseView:
        """The whole base model, for lowering."""
        ...

    def __call__(self, delta: AdapterDelta, give_way: Callable[[], None]) -> PackedAdapter:
        """This rank's part of ``delta``, when every rank keeps its own. ``give_way`` is called between two tables.

        Raises as ``pack_adapter`` does, and GroupLost.
        """
        ...

    def fold(self, delta: AdapterDelta, room_bytes: int, give_way: Callable[[], None]) -> PackedAdapter:
        """The same of ``delta`` folded into the base (``adapters/folding.py``), which may take ``room_bytes``.
        ``give_way`` is called between two layers.

        Raises as ``check_foldable`` and ``fold_sites`` do, and GroupLost.
        """
        ...


class Others(Protocol):
    """Owned by the engine loop; ``packer`` gives what its loader's thread may use."""

    @property
    def size(self) -> int:
        """Ranks of the group, the first one among them."""
        ...

    @property
    def weight_bytes(self) -> int:
        """What the others hold of the base, once they have agreed."""
        ...

    def join(self, device: torch.device) -> TPGroup:
        """The group, when all ranks are there. Raises GroupLost: some did not come in time."""
        ...

    def agree(self, sizes: PoolSizes) -> PoolSizes:
        """Pools that every rank has room for, when all have loaded; they begin to take them.

        Raises GroupLost, or the LoraplexError that another rank could not start for.
        """
        ...

    def await_serving(self) -> None:
        """Return when all ranks follow orders. Raises as ``agree`` does."""
        ...

    def tell(self, order: Order) -> None:
        """Have the others do what this rank does next."""
        ...

    def check(self) -> None:
        """Raises GroupLost: one of them has ended, or says nothing any more. Called when no step runs."""
        ...

    def blame(self, error: Exception) -> GroupLost:
        """What to raise when a step has failed: which of the others ended, if one did."""
        ...

    def packer(self, model: BaseModel, slots: SlotBook, max_bytes: int) -> Packer:
        """Of adapters on ``model``, whose weights of their own may take ``max_bytes``. ``slots``: which are taken."""
        ...

    def close(self, *, for_good: bool = True) -> None:
        """End them. ``for_good``: no other group is to follow; machines that wait for one need not."""
        ...


class LocalPacker:
    """Adapters of a model that is whole."""

    def __init__(self, model: BaseModel, max_bytes: int) -> None:
        self.base = view_of(model)
        self._tables = model.tables()
        self._max_bytes = max_bytes

    def __call__(self, delta: AdapterDelta, give_way: Callable[[], None]) -> PackedAdapter:
        return pack_adapter(delta, self._tables, self.base, max_bytes=self._max_bytes, give_way=give_way)

    def fold(self, delta: AdapterDelta, room_bytes: int, give_way: Callable[[], None]) -> PackedAdapter:
        check_foldable(delta, self._tables, room_bytes)
        writes = fold_sites(delta.uid, delta.sites, delta.sites, self._tables, self.base, give_way)
        return PackedAdapter(folded_facts(delta, footprint_of(writes).nbytes), writes)


class Alone:
    """No others."""

    size = 1
    weight_bytes = 0

    def join(self, device: torch.device) -> TPGroup:
        return solo()

    def agree(self, sizes: PoolSizes) -> PoolSizes:
        return sizes

    def await_serving(self) -> None:
        return None

    def tell(self, order: Order) -> None:
        return None

    def check(self) -> None:
        return None

    def blame(self, error: Exception) -> GroupLost:
        raise error

    def packer(self, model: BaseModel, slots: SlotBook, max_bytes: int) -> Packer:
        return LocalPacker(model, max_bytes)

    def close(self, *, for_good: bool = True) -> None:
        return None
