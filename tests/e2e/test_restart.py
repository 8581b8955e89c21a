"""An engine or one of its ranks is killed under load: requests end UNAVAILABLE, and a moment later the server serves
again, adapters included."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from loraplex_client import Client, MergeOptions, Params, Unavailable
from tests.engines import make_adapters
from tests.routers import random_prototypes, write_router
from tests.servers import Serving, serve, statuses, until
from tests.tiny import prompt, tiny_checkpoint

LONG = Params(max_tokens=200, ignore_eos=True, token_ids=True)
SHORT = Params(max_tokens=8, ignore_eos=True, token_ids=True)
#: what an operator is promised
WITHIN_S = 15.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("restart")


@pytest.fixture(scope="module")
def adapters(root: Path) -> dict[str, Path]:
    return make_adapters(tiny_checkpoint(root, "llama"), root / "adapters", ("all", "vocabulary"))


@pytest.fixture
def flags(root: Path, adapters: dict[str, Path]) -> list[str]:
    return ["--adapter-dir", str(root), *(f"--adapter={name}={path}" for name, path in adapters.items())]


@pytest.fixture
def server(root: Path, flags: list[str]) -> Iterator[Serving]:
    """Over two ranks."""
    with serve(tiny_checkpoint(root, "llama"), root / "log", "--tensor-parallel-size", "2", *flags) as serving:
        yield serving


def _victim(server: Serving) -> psutil.Process:
    """The last rank of the group, which is the engine itself where it is alone."""
    (engine,) = psutil.Process(server.process.pid).children()
    return next(iter(engine.children()), engine)


def test_a_killed_rank_is_an_interruption(root: Path, server: Serving, adapters: dict[str, Path]) -> None:
    """What is there when it dies is there again: pins, a merge that is served merged, a router."""
    base = tiny_checkpoint(root, "llama")
    router = write_router(root / "router", base, random_prototypes(base, ("all", "merged")))
    with Client(server.address) as client:
        client.merge_adapters("gone", {"all": -0.5})
        client.merge_adapters("merged", {"gone": 1.0, "vocabulary": 0.5}, MergeOptions("cat", svd_rank=4))
        client.unload_adapter("gone")
        client.load_adapter("router", str(router))
        client.set_resident_mode("merged", "merged")
        names = (*adapters, "merged", "auto:router")
        uses = [{}, *({name: 1.0} for name in names), dict.fromkeys(adapters, 0.5)]
        expected = [client.generate(prompt(9), SHORT, adapters=use).token_ids for use in uses]
        assert len(set(expected)) == len(uses) - 1  # the router's choice has a name of its own, too
        merged = client.get_adapter("merged")
        client.pin_adapter("all")
        streams = [client.stream(prompt(9), LONG, adapters=use) for use in uses]
        for stream in streams:
            next(stream)
        victim = _victim(server)
        began = time.monotonic()
        victim.kill()
        for stream in streams:
            with pytest.raises(Unavailable, match="engine"):
                list(stream)
        with pytest.raises(Unavailable, match="started anew") as caught:
            client.generate(prompt(9), SHORT)
        assert caught.value.retry_after_s > 0
        assert statuses(server.address) == {"NOT_SERVING"}
        until(lambda: statuses(server.address) == {"SERVING"}, timeout_s=WITHIN_S)
        assert time.monotonic() - began < WITHIN_S
        assert [client.generate(prompt(9), SHORT, adapters=use).token_ids for use in uses] == expected
        assert {adapter.name: adapter.pinned for adapter in client.list_adapters()} == {
            "all": True,
            "vocabulary": False,
            "merged": False,
            "router": False,
        }
        until(lambda: client.get_adapter("merged").merged_bytes == merged.merged_bytes, timeout_s=WITHIN_S)
        again = client.get_adapter("merged")
        assert (again.kind, again.uid, again.resident_mode) == ("merge:cat", merged.uid, "merged")
        assert client.generate(prompt(9), SHORT, adapters="merged").token_ids == expected[3]
        until(lambda: server.value("loraplex_adapter_resident", adapter="merged", tier="merged") == 1)
        assert server.value("loraplex_engine_restarts_total") == 1
        assert server.value("loraplex_requests_running") == 0
    server.process.terminate()
    assert server.process.wait(15) == 0
    assert not victim.is_running()


def test_an_engine_that_keeps_dying_is_given_up(root: Path, flags: list[str], adapters: dict[str, Path]) -> None:
    """One alone, which has its adapters again as long as it is not."""
    flags += ["--engine-restarts", "1"]
    with serve(tiny_checkpoint(root, "llama"), root / "dying.log", *flags) as server, Client(server.address) as client:
        uses = [{}, *({name: 1.0} for name in adapters)]
        expected = [client.generate(prompt(9), SHORT, adapters=use).token_ids for use in uses]
        client.pin_adapter("all")
        stream = client.stream(prompt(9), LONG, adapters="all")
        next(stream)
        _victim(server).kill()
        with pytest.raises(Unavailable, match="engine"):
            list(stream)
        until(lambda: server.value("loraplex_engine_restarts_total") == 1, timeout_s=WITHIN_S)
        until(lambda: statuses(server.address) == {"SERVING"}, timeout_s=WITHIN_S)
        assert [client.generate(prompt(9), SHORT, adapters=use).token_ids for use in uses] == expected
        assert client.get_adapter("all").pinned
        _victim(server).kill()
        with pytest.raises(Unavailable, match="the engine"):
            until(lambda: client.generate(prompt(9), SHORT) is None)
        assert statuses(server.address) == {"NOT_SERVING"}
        server.process.terminate()
        assert server.process.wait(15) == 1
