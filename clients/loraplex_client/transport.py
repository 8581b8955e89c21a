"""What both clients share of a connection: channel options and the client-side view of a failed call."""

from __future__ import annotations

from typing import Final

import grpc

from loraplex_client.errors import ServerError, server_error

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"
#: answers with prompt logprobs are larger than gRPC's default of 4 MiB
_MAX_ANSWER_BYTES: Final = 64 << 20
CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", _MAX_ANSWER_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


def from_sync(error: grpc.RpcError) -> ServerError:
    """The exception for a failed synchronous call."""
    assert isinstance(error, grpc.Call), "grpc raises calls that ended"
    return server_error(error.code(), error.details(), error.trailing_metadata())


def from_async(error: grpc.aio.AioRpcError) -> ServerError:
    """The exception for a failed asyncio call."""
    return server_error(error.code(), error.details(), error.trailing_metadata())  # type: ignore[arg-type]
