"""The container's health probe against the real health service."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from loraplex_client.health import check, main

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def server() -> Iterator[tuple[str, health.HealthServicer]]:
    servicer = health.HealthServicer()
    with ThreadPoolExecutor(2) as executor:
        running = grpc.server(executor)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, running)
        port = running.add_insecure_port("127.0.0.1:0")
        running.start()
        yield f"127.0.0.1:{port}", servicer
        running.stop(0).wait()


def test_serving(server: tuple[str, health.HealthServicer], capsys: pytest.CaptureFixture[str]) -> None:
    address, servicer = server
    servicer.set("", SERVING)
    assert check(address) == "SERVING"
    assert main(["--server", address]) == 0
    assert capsys.readouterr().out == "SERVING\n"


def test_one_service_may_differ(server: tuple[str, health.HealthServicer]) -> None:
    address, servicer = server
    servicer.set("", SERVING)
    servicer.set("loraplex.v1.GenerationService", NOT_SERVING)
    assert check(address, service="loraplex.v1.GenerationService") == "NOT_SERVING"
    assert main(["--server", address, "--service", "loraplex.v1.GenerationService"]) == 1


def test_unknown_service(server: tuple[str, health.HealthServicer]) -> None:
    with pytest.raises(grpc.RpcError) as error:
        check(server[0], service="loraplex.v1.NoSuchService")
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--server", "127.0.0.1:1", "--timeout", "2"]) == 1
    assert "127.0.0.1:1: UNAVAILABLE" in capsys.readouterr().err


def test_a_name_too_long_for_the_probe() -> None:
    with pytest.raises(ValueError, match="128 bytes; at most 127"):
        check("127.0.0.1:1", service="x" * 128)
