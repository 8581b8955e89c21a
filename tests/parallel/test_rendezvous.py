"""The store at the endpoint: who listens where, and what each machine is called to."""

from __future__ import annotations

import socket

import psutil
import pytest

from loraplex.errors import GroupLost, InvalidConfig
from loraplex.parallel.network import Endpoint
from loraplex.parallel.rendezvous import Meeting, answer_call, keep_store, use_store


def test_a_store_listens_where_it_is_told_and_nowhere_else() -> None:
    kept = keep_store("127.0.0.1", 0, 2, 5.0)
    listening = [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    at_port = {tuple(c.laddr) for c in listening if c.laddr.port == kept.endpoint.port}
    assert at_port == {("127.0.0.1", kept.endpoint.port)}
    with pytest.raises(InvalidConfig, match="the port is taken"):
        keep_store("127.0.0.1", kept.endpoint.port, 2, 5.0)


def test_a_machine_is_called_once_in_each_round() -> None:
    kept = keep_store("127.0.0.1", 0, 3, 5.0)
    assert answer_call(kept.endpoint, 1) is None  # nobody calls yet
    kept.announce("here")
    assert answer_call(kept.endpoint, 1) == "here"
    assert answer_call(kept.endpoint, 1) is None
    assert answer_call(kept.endpoint, 2) == "here"
    again = use_store(kept.endpoint, 3, 5.0)  # a server that is started anew finds the store that others keep
    assert (kept.round, again.round) == (1, 2)
    again.announce("there")
    assert answer_call(kept.endpoint, 1) == "there"


def test_rounds_do_not_meet() -> None:
    kept = keep_store("127.0.0.1", 0, 2, 5.0)
    one, two = (kept.meeting(rank, 2, 5.0) for rank in range(2))
    one.store(kept.store).set("key", "value")
    assert two.store().check(["key"])
    later = Meeting(one.host, one.port, 1, 2, 5.0, round=2)
    assert not later.store().check(["key"])


def test_a_store_that_nobody_keeps_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(GroupLost, match=rf"no store answers at 127\.0\.0\.1:{port} within 1 s"):
        use_store(Endpoint("127.0.0.1", port), 2, 1.0)
