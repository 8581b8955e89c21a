"""Endpoints, machines that cannot share ranks, and the interface that ranks meet over."""

from __future__ import annotations

import socket

import pytest

from loraplex.config import Config, ModelConfig, NodesConfig, torchrun_settings
from loraplex.errors import InvalidConfig
from loraplex.parallel.network import Endpoint, check_nodes, group_environment, interface_of, listen


@pytest.mark.parametrize(
    ("text", "found"),
    [("10.0.0.1:29500", Endpoint("10.0.0.1", 29500)), ("first.cluster", Endpoint("first.cluster", 29400))],
)
def test_endpoints(text: str, found: Endpoint) -> None:
    assert Endpoint.parse(text) == found


@pytest.mark.parametrize("text", ["", ":1", "a:", "a:b", "a:-1", "a:0", "a:65536", "[::1]:1", "::1", "a:\u0661"])
def test_what_is_no_endpoint_is_named(text: str) -> None:
    with pytest.raises(InvalidConfig, match="rdzv_endpoint") as caught:
        Endpoint.parse(text)
    assert repr(text) in str(caught.value)
    assert caught.value.field == "rdzv_endpoint"


def test_a_host_without_an_address_is_named() -> None:
    with pytest.raises(InvalidConfig, match=r"no IPv4 address of 'no\.such\.host\.invalid' is known here"):
        Endpoint.parse("no.such.host.invalid").address()


def test_an_address_that_is_not_here_says_which_machine_is_the_first() -> None:
    with pytest.raises(InvalidConfig, match=r"192\.0\.2\.1:29400.*no address of this machine.*--node-rank 0"):
        listen("192.0.2.1", 29400)


def _config(ranks: int, nodes: NodesConfig) -> Config:
    return Config(model=ModelConfig(tensor_parallel_size=ranks), nodes=nodes)


@pytest.mark.parametrize(
    ("ranks", "nodes", "complaint"),
    [
        (2, NodesConfig(nnodes=4), "nnodes 4 does not divide tensor_parallel_size 2"),
        (4, NodesConfig(nnodes=2, node_rank=2), "node_rank 2 is not one of 2 machines; allowed are 0 to 1"),
        (4, NodesConfig(node_rank=1), "node_rank 1 is not one of 1 machines; allowed are 0 to 0"),
        (4, NodesConfig(nnodes=2), "nnodes 2 needs a place where they meet"),
        (4, NodesConfig(nnodes=2, node_rank=1, rdzv_endpoint="x:y"), "'x:y' is not HOST:PORT"),
    ],
)
def test_machines_that_cannot_share_or_meet(ranks: int, nodes: NodesConfig, complaint: str) -> None:
    with pytest.raises(InvalidConfig, match=complaint):
        check_nodes(_config(ranks, nodes))


def test_a_port_that_is_taken_is_refused_on_the_first_machine_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        first = NodesConfig(nnodes=2, rdzv_endpoint=endpoint)
        with pytest.raises(InvalidConfig, match=f"cannot listen on {endpoint}: the port is taken"):
            check_nodes(_config(2, first))
        check_nodes(_config(2, NodesConfig(nnodes=2, rdzv_endpoint=endpoint, node_rank=1)))
        check_nodes(_config(2, NodesConfig(nnodes=2, rdzv_endpoint=endpoint, external_store=True)))


def test_ranks_meet_over_the_interface_that_leads_to_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") == ""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    here = group_environment(Config(model=ModelConfig(threads=3)))
    assert (here["GLOO_SOCKET_IFNAME"], here["OMP_NUM_THREADS"]) == ("lo", "3")
    assert "NCCL_SOCKET_IFNAME" not in here
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "of-the-operator")
    assert group_environment(Config())["GLOO_SOCKET_IFNAME"] == "of-the-operator"


def test_what_torchrun_says() -> None:
    outside = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_RDZV_ENDPOINT": "a:1", "RANK": "7", "MASTER_ADDR": "b"}
    assert torchrun_settings(outside) == {
        "nnodes": ("PET_NNODES", "2"),
        "node_rank": ("PET_NODE_RANK", "1"),
        "rdzv_endpoint": ("PET_RDZV_ENDPOINT", "a:1"),
    }
    by_master = {"PET_NNODES": "2", "PET_MASTER_ADDR": "b", "PET_MASTER_PORT": "2"}
    assert torchrun_settings(by_master)["rdzv_endpoint"] == ("PET_MASTER_ADDR and PET_MASTER_PORT", "b:2")
    inside = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "1", "WORLD_SIZE": "2"}
    inside |= {"MASTER_ADDR": "c", "MASTER_PORT": "3", "PET_NNODES": "9"}
    assert {key: text for key, (_, text) in torchrun_settings(inside).items()} == {
        "nnodes": "2",
        "node_rank": "1",
        "external_store": "True",
        "rdzv_endpoint": "c:3",
    }
    assert torchrun_settings({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "c", "MASTER_PORT": "3"}) == {}
