"""Exceptions to gRPC statuses: one table from class to code, and the details that go with it.

``guarded`` is the one place where an RPC's exceptions end. What is not a LoraplexError is a bug of ours: it is logged
once, with the request id, and the caller is told only the id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from loraplex import errors

logger = logging.getLogger(__name__)

CODES: Final[dict[type[BaseException], grpc.StatusCode]] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidAdapter: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnsupportedFeature: grpc.StatusCode.UNIMPLEMENTED,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.Mismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NonFinite: grpc.StatusCode.FAILED_PRECONDITION,
    errors.OverCapacity: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.GroupLost: grpc.StatusCode.UNAVAILABLE,
    errors.NotPermitted: grpc.StatusCode.PERMISSION_DENIED,
    errors.InvalidModel: grpc.StatusCode.FAILED_PRECONDITION,
    errors.InvalidConfig: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ConversionFailed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.RequestCancelled: grpc.StatusCode.CANCELLED,
    errors.InternalError: grpc.StatusCode.INTERNAL,
    asyncio.CancelledError: grpc.StatusCode.CANCELLED,
}
ERROR_DOMAIN: Final = "loraplex"
#: the message travels twice in the trailers, once percent-encoded; clients refuse some trailers above 8 KiB
_MAX_MESSAGE_BYTES: Final = 1500

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class Call:
    """One RPC as its errors name it: the request id is filled in once it is known."""

    request_id: str = ""


@contextlib.asynccontextmanager
async def guarded(context: Context) -> AsyncIterator[Call]:
    """Run an RPC's body; an exception in it ends the call with its status. Cancellation passes through."""
    call = Call()
    try:
        yield call
    except grpc.aio.AbortError:
        raise
    except Exception as error:
        await _abort(context, _told(error, call), call)


@contextlib.contextmanager
def sending() -> Iterator[None]:
    """Around all that is sent to a caller: one that is gone counts as cancelled, whatever it was to be told."""
    try:
        yield
    except grpc.aio.InternalError:  # what the transport raises when it can send no more
        raise asyncio.CancelledError from None


def code_of(error: BaseException) -> grpc.StatusCode:
    """The status code that ``error`` ends an RPC with."""
    return CODES.get(type(error), grpc.StatusCode.INTERNAL)


def status_of(error: errors.LoraplexError, request_id: str) -> status_pb2.Status:
    """The google.rpc.Status of an error: ErrorInfo always, BadRequest and RetryInfo where they say something."""
    message = str(error)
    encoded = message.encode("utf-8", "replace")
    if len(encoded) > _MAX_MESSAGE_BYTES:
        message = encoded[:_MAX_MESSAGE_BYTES].decode("utf-8", "ignore") + "..."
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=type(error).__name__, domain=ERROR_DOMAIN, metadata={"request_id": request_id} if request_id else {}
        )
    ]
    if error.field:
        # The description is the status message; repeating it would only fill the trailers.
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s > 0:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code_of(error).value[0], message=message)
    status.details.extend(map(_packed, details))
    return status


def _told(error: Exception, call: Call) -> errors.LoraplexError:
    """What the caller is told of ``error``. Bugs of ours are logged here, once."""
    if isinstance(error, errors.LoraplexError) and not isinstance(error, errors.InternalError):
        return error
    logger.error("request %s: internal error: %s", call.request_id or "-", error, exc_info=error)
    return errors.InternalError(
        f"internal error ({type(error).__name__}); look up request id {call.request_id!r} in the server's log"
    )


async def _abort(context: Context, error: errors.LoraplexError, call: Call) -> NoReturn:
    status = rpc_status.to_status(status_of(error, call.request_id))
    # May wait for ever behind data that the caller does not read: by now nothing but this coroutine is held for it.
    with sending():
        await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort returned")


def _packed(message: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed
