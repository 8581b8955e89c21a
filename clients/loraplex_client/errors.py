"""What a call can fail with: one exception a status code.

::

    ServerError                 catch this to catch them all
    |-- InvalidArgument         mend ``field`` and send it again
    |-- NotFound                no such adapter or source; the message names the nearest
    |-- AlreadyExists           the name is taken: use another, or replace=True
    |-- FailedPrecondition      it does not fit this base model or the server's present state
    |-- ResourceExhausted       full: retry after ``retry_after_s``
    |-- Unavailable             no server there, or it drains or has lost its engine
    |-- Unimplemented           known and refused by name, or not built yet
    |-- DeadlineExceeded        ``timeout`` passed
    |-- Cancelled               the call was cancelled
    |-- PermissionDenied        outside what the operator allows
    |-- Unauthenticated         no valid credentials
    `-- Internal                a bug of the server: look up ``request_id`` in its log
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import grpc
from google.protobuf.message import DecodeError


@dataclass(frozen=True, slots=True)
class Details:
    """What a status says beside its message; each part may be empty."""

    field: str = ""
    retry_after_s: float = 0.0
    request_id: str = ""
    #: whether a Loraplex server said this; False: the transport did, for want of one
    from_server: bool = False


class ServerError(Exception):
    """A call failed. ``str(error)`` is the server's message."""

    def __init__(self, message: str, code: grpc.StatusCode, details: Details) -> None:
        super().__init__(message)
        self.code = code
        #: the request field ("sampling.top_p") or the key of an adapter's file that the message is about, or empty
        self.field = details.field
        #: seconds after which a retry may succeed, or 0
        self.retry_after_s = details.retry_after_s
        #: what to look up in the server's log, or empty
        self.request_id = details.request_id
        #: False when no server said this: none was reached, or the connection was lost
        self.from_server = details.from_server


class InvalidArgument(ServerError):
    """A request field is wrong."""


class NotFound(ServerError):
    """No such adapter or source."""


class AlreadyExists(ServerError):
    """The name is taken."""


class FailedPrecondition(ServerError):
    """It does not fit this base model or state."""


class ResourceExhausted(ServerError):
    """A queue or memory budget is full."""


class Unavailable(ServerError):
    """No server there, or it takes no work now."""


class Unimplemented(ServerError):
    """Known and refused, or not built yet."""


class DeadlineExceeded(ServerError):
    """The timeout passed."""


class Cancelled(ServerError):
    """The call was cancelled."""


class PermissionDenied(ServerError):
    """Outside what the operator allows."""


class Unauthenticated(ServerError):
    """No valid credentials."""


class Internal(ServerError):
    """A bug of the server."""


_CLASSES: Final[dict[grpc.StatusCode, type[ServerError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.INTERNAL: Internal,
}


def server_error(
    code: grpc.StatusCode, message: str | None, trailers: Iterable[tuple[str, str | bytes]] | None
) -> ServerError:
    """The exception for a failed call's code, message and trailing metadata."""
    return _CLASSES.get(code, ServerError)(message or code.name, code, _details(dict(trailers or ())))


def _details(trailers: dict[str, str | bytes]) -> Details:
    """Read from ``grpc-status-details-bin``; empty where googleapis-common-protos is not installed."""
    raw = trailers.get("grpc-status-details-bin")
    if not isinstance(raw, bytes):
        return Details()
    try:
        from google.rpc import error_details_pb2, status_pb2
    except ImportError:
        return Details(from_server=True)
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    info = error_details_pb2.ErrorInfo()
    try:
        for detail in status_pb2.Status.FromString(raw).details:
            # Each call fills its message only when the detail is of that type.
            detail.Unpack(bad) or detail.Unpack(retry) or detail.Unpack(info)
    except DecodeError:
        return Details(from_server=True)
    return Details(
        field=bad.field_violations[0].field if bad.field_violations else "",
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9,
        request_id=info.metadata.get("request_id", ""),
        from_server=True,
    )
