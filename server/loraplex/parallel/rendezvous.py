"""Where the machines of a group find each other: a store at an endpoint that all of them know, as torchrun's.

A server that is started anew meets the other machines in a new *round*, whose keys lie beside those of the rounds
before it: torchrun's store outlives them. Whoever reaches the endpoint can read and write the store: it is for trusted
networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from loraplex.errors import GroupLost
from loraplex.parallel.network import Endpoint, listen

_PREFIX: Final = "loraplex"
_ROUND: Final = f"{_PREFIX}/round"
_ROUNDS: Final = f"{_PREFIX}/rounds"
#: for one key of a store that answers
_ANSWER_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the ranks of a group find each other: a store at ``host``:``port``, and the round in it.

    ``timeout_s``: how long a rank waits for the others, here and in every sum.
    """

    host: str
    port: int
    rank: int
    size: int
    timeout_s: float
    round: int = 1

    def store(self, kept: Store | None = None) -> Store:
        """This round's part of the store. ``kept``: the store, where this process has it already.

        Raises RuntimeError: nobody answers there.
        """
        if kept is None:
            kept = _reach(Endpoint(self.host, self.port), self.size, self.timeout_s)
        return PrefixStore(f"{_PREFIX}/{self.round}", kept)


@dataclass(frozen=True, slots=True)
class KeptStore:
    """The store as the first rank has it, at the place where the others reach it; and its round."""

    endpoint: Endpoint
    store: Store
    round: int

    def meeting(self, rank: int, size: int, timeout_s: float) -> Meeting:
        """Of one rank of ``size``."""
        return Meeting(self.endpoint.host, self.endpoint.port, rank, size, timeout_s, self.round)

    def announce(self, call: str) -> None:
        """Let the other machines begin, and know ``call``."""
        self.store.set(_call_of(self.round), call)
        self.store.set(_ROUND, str(self.round))


def keep_store(address: str, port: int, size: int, timeout_s: float) -> KeptStore:
    """A store of this process's own, at ``address`` alone; port 0 is one of the system's choice.

    Raises InvalidConfig: the port is taken.
    """
    listening = listen(address, port)
    port = int(listening.getsockname()[1])
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(
        address,
        port,
        size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    return _in_next_round(Endpoint(address, port), store)


def use_store(endpoint: Endpoint, size: int, timeout_s: float) -> KeptStore:
    """The store that somebody else keeps at ``endpoint``. Raises GroupLost: nobody answers there."""
    try:
        return _in_next_round(endpoint, _reach(endpoint, size, timeout_s))
    except RuntimeError as error:
        raise GroupLost(f"no store answers at {endpoint} within {timeout_s:g} s (--rdzv-endpoint)") from error


def answer_call(endpoint: Endpoint, node_rank: int) -> str | None:
    """The call of the present round, once for each machine; None when this one has answered it already, or there is
    none.

    Raises RuntimeError: nobody answers at ``endpoint``, or nobody calls.
    """
    store = _reach(endpoint, None, _ANSWER_S)
    if not store.check([_ROUND]):
        return None
    number = int(store.get(_ROUND))
    if store.add(f"{_PREFIX}/{number}/node/{node_rank}", 1) > 1:
        return None
    return store.get(_call_of(number)).decode()


def _reach(endpoint: Endpoint, size: int | None, timeout_s: float) -> TCPStore:
    return TCPStore(endpoint.host, endpoint.port, size, is_master=False, timeout=timedelta(seconds=timeout_s))


def _in_next_round(endpoint: Endpoint, store: Store) -> KeptStore:
    return KeptStore(endpoint, store, store.add(_ROUNDS, 1))


def _call_of(number: int) -> str:
    return f"{_PREFIX}/{number}/call"
