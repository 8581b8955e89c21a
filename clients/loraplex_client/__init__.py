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
from loraplex_client.exports import ExportProgress
from loraplex_client.merges import Merge, MergeInput
from loraplex_client.requests import Adapters, MergeOptions, Message, Params, Prompt
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
from loraplex_client.routers import Candidate, Router, Routing
from loraplex_client.synchronous import Client

__all__ = [
    "Adapter",
    "AdapterUse",
    "Adapters",
    "AlreadyExists",
    "AsyncClient",
    "Cancelled",
    "Candidate",
    "Chunk",
    "Client",
    "DeadlineExceeded",
    "ExportProgress",
    "FailedPrecondition",
    "GenerationProfile",
    "Internal",
    "InvalidArgument",
    "Limits",
    "Merge",
    "MergeInput",
    "MergeOptions",
    "Message",
    "Model",
    "NotFound",
    "Params",
    "PermissionDenied",
    "Probe",
    "Prompt",
    "ResourceExhausted",
    "Result",
    "Router",
    "Routing",
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
