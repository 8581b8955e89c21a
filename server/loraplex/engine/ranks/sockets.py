"""The sockets between the first rank and another one: pairs that drop nothing."""

from __future__ import annotations

import zmq

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]


def bound(context: Context, address: str) -> Socket:
    """The first rank's end."""
    socket = _pair(context)
    socket.bind(address)
    return socket


def connected(context: Context, address: str) -> Socket:
    """The other rank's end."""
    socket = _pair(context)
    socket.connect(address)
    return socket


def _pair(context: Context) -> Socket:
    socket = context.socket(zmq.PAIR)
    # adapters' shares and a full queue of steps: neither may be dropped, and both are bounded by who sends them
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    return socket
