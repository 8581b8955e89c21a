"""Ask a server for its health: ``python -m loraplex_client.health``, exit code 0 when it serves. What a container's
HEALTHCHECK or a probe runs.

Speaks grpc.health.v1 with two hand-packed messages, so that the bare client needs no generated health stubs:
request ``{1: string service}``, answer ``{1: enum status}`` with SERVING = 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import grpc

CHECK = "/grpc.health.v1.Health/Check"
DEFAULT_SERVER = "127.0.0.1:50051"
MAX_SERVICE_BYTES = 127  # so that the field's length fits one byte

_STATUS = {b"": "UNKNOWN", b"\x08\x00": "UNKNOWN", b"\x08\x01": "SERVING", b"\x08\x02": "NOT_SERVING"}


def check(server: str = DEFAULT_SERVER, *, service: str = "", timeout_s: float = 3.0) -> str:
    """The status of ``service`` ("" means the whole server): SERVING, NOT_SERVING or UNKNOWN.

    Raises grpc.RpcError when the server does not answer within ``timeout_s`` seconds or does not know the service.
    """
    name = service.encode()
    if len(name) > MAX_SERVICE_BYTES:
        raise ValueError(f"service name of {len(name)} bytes; at most {MAX_SERVICE_BYTES} are allowed: {service!r}")
    request = b"\x0a" + bytes([len(name)]) + name if name else b""
    with grpc.insecure_channel(server) as channel:
        answer: bytes = channel.unary_unary(CHECK, bytes, bytes)(request, timeout=timeout_s)
    return _STATUS.get(answer, "UNKNOWN")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the status; 0 when SERVING, 1 when not or unreachable."""
    parser = argparse.ArgumentParser(
        prog="python -m loraplex_client.health", description="Ask a server for its health."
    )
    parser.add_argument("--server", default=DEFAULT_SERVER, metavar="ADDR")
    parser.add_argument("--service", default="", help="loraplex.v1.GenerationService, say; the whole server by default")
    parser.add_argument("--timeout", type=float, default=3.0, metavar="SECONDS")
    args = parser.parse_args(argv)
    try:
        status = check(args.server, service=args.service, timeout_s=args.timeout)
    except grpc.RpcError as error:
        print(f"{args.server}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    print(status)
    return 0 if status == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main())
