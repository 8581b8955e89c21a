"""The network between the machines of a group: where they meet, and what this one is called there. Linux, IPv4."""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
from dataclasses import dataclass
from typing import Final

from loraplex.config import LOOPBACK, Config, engine_environment
from loraplex.errors import InvalidConfig

#: torchrun's
DEFAULT_PORT: Final = 29400
_SIOCGIFADDR: Final = 0x8915
#: of sockets that wait to be accepted
_BACKLOG: Final = 128
#: a connection that is silent for so long is asked whether it is still there, so often, until it is given up
_KEEPALIVE: Final = {socket.TCP_KEEPIDLE: 4, socket.TCP_KEEPINTVL: 2, socket.TCP_KEEPCNT: 3}
_UNSENT_MS: Final = 10_000
_PROBE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """HOST:PORT of a TCP service."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @staticmethod
    def parse(text: str) -> Endpoint:
        """HOST:PORT, or HOST with torchrun's port. Raises InvalidConfig."""
        host, _, port = text.rpartition(":") if ":" in text else (text, ":", str(DEFAULT_PORT))
        if not host or "[" in host or ":" in host or not port.isascii() or not port.isdigit():
            raise InvalidConfig(
                f"rdzv_endpoint {text!r} is not HOST:PORT with a name or an IPv4 address, such as 10.0.0.1:29400 "
                "(--rdzv-endpoint)",
                field="rdzv_endpoint",
            )
        if not 0 < int(port) < 1 << 16:
            raise InvalidConfig(
                f"rdzv_endpoint {text!r}: {port} is not a port; allowed are 1 to 65535 (--rdzv-endpoint)",
                field="rdzv_endpoint",
            )
        return Endpoint(host, int(port))

    def address(self) -> str:
        """The host's IPv4 address. Raises InvalidConfig: there is none."""
        try:
            found = socket.getaddrinfo(self.host, self.port, socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            raise InvalidConfig(
                f"rdzv_endpoint: no IPv4 address of {self.host!r} is known here: {error.strerror} (--rdzv-endpoint)",
                field="rdzv_endpoint",
            ) from error
        return str(found[0][4][0])

    def probe(self) -> None:
        """Raises OSError: nothing listens there."""
        socket.create_connection((self.address(), self.port), _PROBE_S).close()

    def own_address(self) -> str:
        """The address that this machine has towards it. Raises InvalidConfig: no way leads there."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # which sends nothing
            try:
                probe.connect((self.address(), self.port))
            except OSError as error:
                raise InvalidConfig(
                    f"rdzv_endpoint: no way leads from here to {self}: {error.strerror} (--rdzv-endpoint)",
                    field="rdzv_endpoint",
                ) from error
            return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """The network interface that has ``address``; empty where none has it as its first."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


def listen(address: str, port: int = 0) -> socket.socket:
    """A socket that listens at ``address``, at a port of the system's choice where it is 0.

    Raises InvalidConfig: the port is taken, or the address is not this machine's.
    """
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        why = error.strerror
        if error.errno == errno.EADDRINUSE:
            why = "the port is taken; choose another one for all machines"
        elif error.errno == errno.EADDRNOTAVAIL:
            why = "that is no address of this machine; the machine that it names is the one with --node-rank 0"
        raise InvalidConfig(
            f"rdzv_endpoint: cannot listen on {address}:{port}: {why} (--rdzv-endpoint)", field="rdzv_endpoint"
        ) from error
    return listening


def check_nodes(config: Config) -> None:
    """Raises InvalidConfig: the machines cannot share the ranks, or cannot meet."""
    nodes, ranks = config.nodes, config.model.tensor_parallel_size
    if ranks % nodes.nnodes:
        raise InvalidConfig(
            f"nnodes {nodes.nnodes} does not divide tensor_parallel_size {ranks}: each machine takes as many ranks "
            "(--nnodes, --tensor-parallel-size)",
            field="nnodes",
        )
    if nodes.node_rank >= nodes.nnodes:
        raise InvalidConfig(
            f"node_rank {nodes.node_rank} is not one of {nodes.nnodes} machines; allowed are 0 to {nodes.nnodes - 1} "
            "(--node-rank, --nnodes)",
            field="node_rank",
        )
    if nodes.nnodes == 1:
        return
    if not nodes.rdzv_endpoint:
        raise InvalidConfig(
            f"nnodes {nodes.nnodes} needs a place where they meet: HOST:PORT on the first machine (--rdzv-endpoint)",
            field="rdzv_endpoint",
        )
    endpoint = Endpoint.parse(nodes.rdzv_endpoint)
    if nodes.node_rank == 0 and not nodes.external_store:
        listen(endpoint.address(), endpoint.port).close()


def group_environment(config: Config) -> dict[str, str]:
    """The environment of processes that hold ranks on this machine: ranks meet over the network that leads to the
    endpoint, on one machine over loopback."""
    nodes, interface = config.nodes, LOOPBACK
    if nodes.nnodes > 1:
        interface = interface_of(Endpoint.parse(nodes.rdzv_endpoint).own_address())
    return engine_environment(config.model.threads, config.ranks_here, interface)


def keep_alive(connection: socket.socket) -> None:
    """Have the system notice, within ten seconds, that the far end of ``connection`` is out of reach."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNSENT_MS)
