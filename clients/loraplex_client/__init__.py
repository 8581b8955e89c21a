"""Clients of a Loraplex server: ``Client`` (synchronous) and ``AsyncClient`` (asyncio). Needs grpcio and protobuf only.

Example::

    from loraplex_client import Client, Params

    with Client("127.0.0.1:50051") as client:
        print(client.generate("Write a haiku.", Params(max_tokens=64), adapters="rhyme").text)
"""

from loraplex_client.asynchronous import AsyncClient
from loraplex_client.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    ServerError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from loraplex_client.requests import Adapters, Message, Params, Prompt
from loraplex_client.results import (
    Adapter,
    AdapterUse,
    Chunk,
    GenerationProfile,
    Limits,
    Model,
    Probe,
    Result,
    Sampling,
    TokenizerInfo,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from loraplex_client.synchronous import Client

__all__ = [
    "Adapter",
    "AdapterUse",
    "Adapters",
    "AlreadyExists",
    "AsyncClient",
    "Cancelled",
    "Chunk",
    "Client",
    "DeadlineExceeded",
    "FailedPrecondition",
    "GenerationProfile",
    "Internal",
    "InvalidArgument",
    "Limits",
    "Message",
    "Model",
    "NotFound",
    "Params",
    "PermissionDenied",
    "Probe",
    "Prompt",
    "ResourceExhausted",
    "Result",
    "Sampling",
    "ServerError",
    "TokenLogprob",
    "TokenizerInfo",
    "TopLogprob",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Usage",
]
