"""ExportAdapter through real gRPC, both clients and the command line, with an engine that is scripted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from loraplex.cli import main
from loraplex.commands.export import destination_to_send
from loraplex.types import ExportFormat
from loraplex_client import AsyncClient, Client, ExportProgress
from loraplex_client import NotFound as NotFoundThere
from loraplex_proto.v1.adapters_pb2 import ExportAdapterRequest, LoadAdapterRequest
from tests.rpc.serving import Served, serving, serving_thread
from tests.servers import command, environment, until

STAGES = [ExportProgress("writing weights", done * 1000, 3000, "/exports/to") for done in range(4)]
DONE = ExportProgress("done", 3000, 3000, "/exports/to")
DONE_INT8 = ExportProgress("done", 3000, 3000, "/exports/to", 0.1, "model.layers.0.mlp.up_proj", 0.08)


@pytest.fixture
def server() -> Iterator[Served]:
    with serving_thread() as served:
        with Client(served.app.address) as client:
            client.load_adapter("fr", "/a/fr")
        yield served


@pytest.mark.parametrize(
    ("request_", "part"),
    [
        (ExportAdapterRequest(name="fr", destination="to"), "format: none is unknown; allowed are PEFT, MERGED"),
        (ExportAdapterRequest(name="fr", destination="to", format=9), "format: 9 is unknown"),  # type: ignore[arg-type]
        (ExportAdapterRequest(name="", destination="to", format="PEFT"), "name: '' is not a name"),
        (ExportAdapterRequest(name="fr", format="PEFT"), "destination: '' is no directory"),
        (
            ExportAdapterRequest(name="fr", destination="a\0b", format="PEFT"),
            "a.*b' is no directory",
        ),
        (ExportAdapterRequest(name="fr", destination="a" * 5000, format="PEFT"), "allowed are 1 to 4096 bytes"),
        (
            ExportAdapterRequest(name="fr", destination="to", format="PEFT", max_shard_bytes=7),
            "max_shard_bytes: 7 has no use in format PEFT",
        ),
        (
            ExportAdapterRequest(name="fr", destination="to", format="MERGED", quantization="nf3"),
            "quantization: 'nf3' is unknown; allowed are nf4, fp4, int8, fp8, or nothing",
        ),
        (
            ExportAdapterRequest(name="fr", destination="to", format="PEFT", quantization="nf4"),
            "quantization: nf4 has no use in format PEFT",
        ),
    ],
)
def test_fields_are_checked(request_: ExportAdapterRequest, part: str) -> None:
    async def run() -> None:
        async with serving() as server:
            await server.adapters.LoadAdapter(LoadAdapterRequest(name="fr", source="/a/fr"))
            with pytest.raises(grpc.aio.AioRpcError, match=part) as caught:
                await server.adapters.ExportAdapter(request_).read()
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert not server.engine.exports

    asyncio.run(run())


def test_both_clients_are_told_how_far_it_has_come(server: Served) -> None:
    with Client(server.app.address) as client:
        told = client.export_adapter("fr", "to", format="merged", max_shard_bytes=5)
        assert list(told) == [*STAGES, DONE]
        assert list(client.export_adapter("fr", "to")) == [*STAGES, DONE]
        with pytest.raises(NotFoundThere, match="nope"):
            list(client.export_adapter("nope", "to"))
        with pytest.raises(ValueError, match="format 'gguf' is unknown; allowed are peft, merged"):
            list(client.export_adapter("fr", "to", format="gguf"))

        assert list(client.export_adapter("fr", "to", format="merged", quantization="int8")) == [*STAGES, DONE_INT8]

    async def run() -> list[ExportProgress]:
        async with AsyncClient(server.app.address) as client:
            return [each async for each in client.export_adapter("fr", "to", format="merged", quantization="int8")]

    assert asyncio.run(run()) == [*STAGES, DONE_INT8]
    assert server.engine.exports == [
        ("fr", "to", ExportFormat.MERGED, 5, ""),
        ("fr", "to", ExportFormat.PEFT, 0, ""),
        ("fr", "to", ExportFormat.MERGED, 0, "int8"),
        ("fr", "to", ExportFormat.MERGED, 0, "int8"),
    ]
    assert not server.engine.given_up


def test_a_client_that_goes_away_gives_it_up(server: Served) -> None:
    server.engine.step_s = 0.05
    with Client(server.app.address) as client:
        told = client.export_adapter("fr", "to")
        next(told)
        told.close()
        until(lambda: server.engine.given_up == ["fr"])

    async def run() -> None:
        async with AsyncClient(server.app.address) as client:
            told = client.export_adapter("fr", "to")
            async with contextlib.aclosing(told):
                await anext(told)

    asyncio.run(run())
    until(lambda: server.engine.given_up == ["fr", "fr"])


def test_the_command_line_says_stages_and_where_it_is(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    address = ["--server", server.app.address]
    assert main(["adapters", "export", *address, "fr", "to", "--format", "merged", "--max-shard-size", "2GB"]) == 0
    said = capsys.readouterr()
    assert said.out == "fr exported to /exports/to (0.00 MiB)\n"
    assert said.err == "writing weights ...\n"
    assert server.engine.exports == [("fr", "to", ExportFormat.MERGED, 2 * 10**9, "")]
    assert main(["adapters", "export", *address, "nope", "to"]) == 1
    assert "nope" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["adapters", "export", *address, "fr", "to", "--format", "gguf"])
    assert "invalid choice: 'gguf' (choose from" in capsys.readouterr().err


def test_the_command_line_says_what_quantizing_has_lost(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["adapters", "export", "--server", server.app.address, "fr", "to", "--format", "merged", "--quantization"]
    assert main([*line, "int8"]) == 0
    assert capsys.readouterr().out == (
        "fr exported to /exports/to (0.00 MiB); relative error of a matrix up to 10.00% (model.layers.0.mlp.up_proj), "
        "on average 8.00%\n"
    )
    with pytest.raises(SystemExit):
        main([*line, "nf3"])
    assert "invalid choice: 'nf3' (choose from" in capsys.readouterr().err


def test_interrupting_the_command_gives_it_up(server: Served) -> None:
    server.engine.step_s = 600
    line = command("adapters", "export", "--server", server.app.address, "fr", "to")
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: bool(server.engine.exports), timeout_s=30)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    until(lambda: server.engine.given_up == ["fr"])


def test_paths_of_this_machine_are_sent_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exports").mkdir()
    monkeypatch.chdir(tmp_path)
    assert destination_to_send("exports/a", here=True) == str(tmp_path / "exports" / "a")
    assert destination_to_send(f".{os.sep}a", here=True) == str(tmp_path / "a")
    assert destination_to_send("a", here=True) == "a"  # in the server's own directory
    assert destination_to_send("exports/a", here=False) == "exports/a"
    assert destination_to_send("elsewhere/a", here=True) == "elsewhere/a"
    assert destination_to_send("/exports/a", here=False) == "/exports/a"
