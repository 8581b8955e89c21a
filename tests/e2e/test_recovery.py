"""What a real server does when clients go, adapters change under traffic, its engine dies, or it is told to end."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from loraplex_client import (
    AlreadyExists,
    Chunk,
    Client,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    Params,
    ServerError,
    Unavailable,
)
from loraplex_client.requests import generate_request
from loraplex_proto.v1 import generation_pb2_grpc
from tests.engines import make_adapters
from tests.rpc.test_metrics import documented
from tests.servers import Serving, environment, serve, statuses, tiny_base, until

#: far more tokens than a test waits for
LONG = Params(max_tokens=8000, ignore_eos=True, token_ids=True)
SHORT = Params(max_tokens=16, ignore_eos=True, token_ids=True)
#: more than one page of 16, so that the prefix cache has something to offer
PROMPT = [5 + i for i in range(40)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recovery")


@pytest.fixture(scope="module")
def adapters(root: Path) -> dict[str, Path]:
    return make_adapters(tiny_base(root), root / "adapters", ("all", "attention"))


@pytest.fixture(scope="module")
def server(root: Path, adapters: dict[str, Path]) -> Iterator[Serving]:
    arguments = ["--adapter-dir", str(root / "adapters"), "--adapter", f"kept={adapters['all']}"]
    with serve(tiny_base(root), root / "log", *arguments) as serving:
        yield serving


@pytest.fixture
def client(server: Serving) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@contextlib.contextmanager
def running(client: Client, params: Params = LONG, adapter: str = "") -> Iterator[Iterator[Chunk]]:
    """The chunks of a stream of which the first has come; it is cancelled at the end of the block."""
    stream = client.stream(PROMPT, params, adapters=adapter)
    with contextlib.closing(stream):
        yield itertools.chain([next(stream)], stream)


def held(server: Serving, client: Client) -> dict[str, float]:
    """All that a request may hold."""
    return {
        "pages": server.value("loraplex_kv_pages", state="used"),
        "running": server.value("loraplex_requests_running"),
        "waiting": server.value("loraplex_requests_waiting"),
        "references": sum(adapter.in_flight for adapter in client.list_adapters()),
    }


def nothing_held(server: Serving, client: Client, timeout_s: float = 5.0) -> None:
    until(lambda: not any(held(server, client).values()), timeout_s)


# ---- clients that go ----


def test_a_killed_client_gives_back_pages_and_references(server: Serving, client: Client) -> None:
    code = (
        "import sys\nfrom loraplex_client import Client, Params\n"
        "with Client(sys.argv[1]) as c:\n"
        "    params = Params(max_tokens=8000, ignore_eos=True, token_ids=True)\n"
        "    for chunk in c.stream([5] * 40, params, adapters='kept'):\n"
        "        print(chunk.token_ids, flush=True)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, server.address], stdout=subprocess.PIPE, env=environment(), text=True
    )
    assert child.stdout is not None
    with child, child.stdout:
        assert child.stdout.readline().startswith("(")
        until(lambda: held(server, client)["running"] == 1)
        assert held(server, client)["references"] == 1
        assert held(server, client)["pages"] > 0
        child.kill()
        nothing_held(server, client)
    assert client.generate(PROMPT, SHORT, adapters="kept").token_ids


def test_a_reader_that_stalls_gives_back_pages_and_references(server: Serving, client: Client) -> None:
    request = generate_request(PROMPT, Params(max_tokens=8000, ignore_eos=True, logprobs=20), "kept")
    # a client whose receive buffer does not grow: this one's answer would fit gRPC's own
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65535)]
    with grpc.insecure_channel(server.address, options=options) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.GenerateStream(request)
        next(call)
        until(lambda: held(server, client)["references"] == 1)
        nothing_held(server, client, timeout_s=20.0)
        assert client.generate(PROMPT, SHORT).token_ids
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "stalled" in caught.value.details()


def test_deadline_and_cancellation_end_a_request_within_a_step(server: Serving, client: Client) -> None:
    def generated() -> float:
        return server.value("loraplex_step_sequences_sum")

    with pytest.raises(DeadlineExceeded):
        client.generate(PROMPT, LONG, adapters="kept", timeout=0.3)
    nothing_held(server, client)
    before = generated()
    time.sleep(0.3)
    assert generated() == before, "steps went on after the deadline"
    with running(client, adapter="kept"):
        pass
    nothing_held(server, client)
    before = generated()
    time.sleep(0.3)
    assert generated() == before, "steps went on after the cancellation"
    codes = {
        sample.labels["code"]: sample.value
        for sample in server.metrics()["loraplex_requests"].samples
        if sample.name == "loraplex_requests_total" and sample.labels["adapter"] == "kept"
    }
    assert codes["DEADLINE_EXCEEDED"] == 1
    assert codes["CANCELLED"] >= 1


# ---- adapters that change ----


def test_replace_under_traffic(server: Serving, client: Client, adapters: dict[str, Path]) -> None:
    first = client.load_adapter("a", str(adapters["all"]))
    params = Params(max_tokens=600, ignore_eos=True, token_ids=True)
    old = client.generate(PROMPT, params, adapters="a").token_ids
    with running(client, params, adapter="a") as stream:
        second = client.load_adapter("a", str(adapters["attention"]), replace=True)
        fresh = client.generate(PROMPT, SHORT, adapters="a")
        assert client.get_adapter("a").uid == second.uid
        whole = tuple(token for chunk in stream for token in chunk.token_ids)
    assert whole == old, "the running request left the version it began with"
    assert (first.generation, second.generation) == (1, 2)
    assert first.uid != second.uid
    assert fresh.adapters[0].uid == second.uid
    assert fresh.usage.cached_prompt_tokens == 0, "pages of the old version were used for the new one"
    client.load_adapter("b", str(adapters["attention"]))
    assert fresh.token_ids == client.generate(PROMPT, SHORT, adapters="b").token_ids
    assert fresh.token_ids != old[:16]
    again = client.load_adapter("a", str(adapters["all"]), replace=True)
    assert (again.generation, again.uid) == (3, first.uid)
    assert client.generate(PROMPT, params, adapters="a").token_ids == old
    for name in ("a", "b"):
        client.unload_adapter(name)
    nothing_held(server, client)


def test_unload_answers_when_the_last_request_is_over(
    server: Serving, client: Client, adapters: dict[str, Path]
) -> None:
    client.load_adapter("a", str(adapters["all"]))
    params = Params(max_tokens=1000, ignore_eos=True, token_ids=True)
    with running(client, params, adapter="a") as stream, ThreadPoolExecutor(1) as pool:
        unload = pool.submit(client.unload_adapter, "a")
        until(lambda: client.get_adapter("a").state == "draining")
        with pytest.raises(NotFound, match="'a' is being unloaded and takes no new requests"):
            client.generate(PROMPT, SHORT, adapters="a")
        assert not unload.done()
        assert client.get_adapter("a").in_flight == 1
        assert sum(len(chunk.token_ids) for chunk in stream) == 1000
        assert unload.result(10).state == "unloaded"
    with pytest.raises(NotFound):
        client.get_adapter("a")
    nothing_held(server, client)


def test_unload_with_abort_ends_the_requests(server: Serving, client: Client, adapters: dict[str, Path]) -> None:
    client.load_adapter("a", str(adapters["all"]))
    with running(client, adapter="a") as stream:
        assert client.unload_adapter("a", abort=True).state == "unloaded"
        assert list(stream)[-1].finish_reason == "cancelled"
    nothing_held(server, client)


def test_a_pinned_adapter_is_not_unloaded(server: Serving, root: Path, adapters: dict[str, Path]) -> None:
    with Client(server.address) as client:
        client.load_adapter("p", str(adapters["attention"]), pinned=True)
        with pytest.raises(FailedPrecondition, match="'p' is pinned"):
            client.unload_adapter("p")
        assert not client.pin_adapter("p", pinned=False).pinned
        assert client.unload_adapter("p").state == "unloaded"
        client.load_adapter("p", str(adapters["attention"]))
        assert client.pin_adapter("p").pinned
        assert client.get_adapter("p").pinned
        with pytest.raises(FailedPrecondition, match="unpin it before unloading"):
            client.unload_adapter("p")
        client.load_adapter("p", str(adapters["attention"]), replace=True)
        client.unload_adapter("p")


def test_of_two_loads_of_one_name_at_once_one_wins(client: Client, adapters: dict[str, Path]) -> None:
    barrier = threading.Barrier(4)

    def load(source: str) -> str:
        barrier.wait()
        try:
            return client.load_adapter("twice", source).uid
        except AlreadyExists as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(load, [str(adapters["all"]), str(adapters["attention"])] * 2))
    winner = client.get_adapter("twice")
    refusals = sorted(told for told in answers if told.startswith("adapter 'twice' is "))
    assert len(refusals) == 3
    assert set(answers) - set(refusals) == {winner.uid}
    assert (winner.state, winner.generation) == ("ready", 1)
    client.unload_adapter("twice")


# ---- what tools see ----


def test_a_stop_string_reports_queue_and_cache(client: Client) -> None:
    whole = client.generate(PROMPT, Params(max_tokens=200, ignore_eos=True)).text
    stop = whole[40:43]
    result = client.generate(PROMPT, Params(max_tokens=200, ignore_eos=True, stop=[stop]))
    assert result.finish_reason == "stop"
    assert result.text == whole[: whole.index(stop)]
    assert result.usage.cached_prompt_tokens == 32
    assert result.usage.queue_s > 0


def test_reflection_is_enough_to_call_generate(server: Serving) -> None:
    """What grpcurl does: list, describe, call, with nothing generated."""
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        names = set(database.get_services())
        ours = {f"loraplex.v1.{name}Service" for name in ("Generation", "Adapter", "Model")}
        assert names >= {*ours, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        pool = descriptor_pool.DescriptorPool(database)
        for name in ours:
            assert pool.FindServiceByName(name).methods
        method = pool.FindServiceByName("loraplex.v1.GenerationService").FindMethodByName("Generate")
        request = message_factory.GetMessageClass(method.input_type)()
        request.text = "the fox"
        request.stop.max_tokens = 3
        request.stop.ignore_eos = True
        request.output.token_ids = True
        request.adapters.add(name="kept")
        answer = message_factory.GetMessageClass(method.output_type)
        call = channel.unary_unary(
            "/loraplex.v1.GenerationService/Generate", lambda m: m.SerializeToString(), answer.FromString
        )
        response = call(request, timeout=10)
        assert len(response.token_ids) == 3
        assert response.adapters[0].uid
        file = descriptor_pb2.FileDescriptorProto()
        method.containing_service.file.CopyToProto(file)
        assert file.name == "loraplex_proto/v1/generation.proto"


def test_a_scrape_carries_every_name(server: Serving, client: Client) -> None:
    client.generate(PROMPT, SHORT, adapters="kept")
    families = server.metrics()
    assert families.keys() >= documented().keys()
    samples = {sample.name for family in families.values() for sample in family.samples}
    for name in ("queue_time", "time_to_first_token", "inter_token_latency", "e2e_latency"):
        assert f"loraplex_{name}_seconds_bucket" in samples
    assert server.value("loraplex_adapter_resident", adapter="kept", tier="device") == 1
    assert server.value("loraplex_adapters", state="ready") == 1
    assert server.value("loraplex_generation_tokens_total", adapter="kept") >= 16
    assert server.value("loraplex_adapter_load_seconds_count", tier="host") >= 1
    assert server.value("loraplex_build_info", architecture="LlamaForCausalLM", dtype="float32") == 1


# ---- ends ----


def watch_to_the_end(client: Client) -> None:
    with contextlib.suppress(ServerError):
        list(client.watch_adapters())


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # nobody is left to reap it
    except psutil.NoSuchProcess:
        return True


def test_a_killed_front_end_leaves_no_engine(root: Path) -> None:
    with serve(tiny_base(root), root / "orphan.log") as server, Client(server.address) as client:
        (engine,) = psutil.Process(server.process.pid).children()
        with running(client) as stream:
            server.process.kill()
            with pytest.raises(Unavailable) as caught:
                list(stream)
        assert not caught.value.from_server
        until(lambda: gone(engine))


def test_a_killed_engine_ends_requests_unavailable_and_the_exit_code_is_1(root: Path) -> None:
    with (
        serve(tiny_base(root), root / "killed.log", "--log-format", "json", "--engine-restarts", "0") as server,
        Client(server.address) as client,
    ):
        assert statuses(server.address) == {"SERVING"}
        (engine,) = psutil.Process(server.process.pid).children()
        with running(client) as stream:
            engine.kill()
            with pytest.raises(Unavailable, match="engine") as caught:
                list(stream)
        assert caught.value.from_server
        until(lambda: statuses(server.address) == {"NOT_SERVING"})
        assert server.value("loraplex_requests_running") == 0
        assert server.value("loraplex_kv_pages", state="used") == 0
        assert server.value("loraplex_requests_total", code="UNAVAILABLE", adapter="base") == 1
        for call in (lambda: client.generate(PROMPT, SHORT), client.list_adapters):
            with pytest.raises(Unavailable, match="the engine is gone"):
                call()
        assert client.model().architecture == "LlamaForCausalLM"
        server.process.terminate()
        assert server.process.wait(15) == 1


def test_sigterm_drains(root: Path) -> None:
    with serve(tiny_base(root), root / "drain.log") as server, Client(server.address) as client:
        params = Params(max_tokens=1500, ignore_eos=True, token_ids=True)
        # a drain waits for requests, not for those who only look on
        watcher = threading.Thread(target=watch_to_the_end, args=(client,))
        watcher.start()
        with running(client, params) as stream:
            server.process.terminate()
            until(lambda: statuses(server.address) == {"NOT_SERVING"})
            with pytest.raises(Unavailable, match="draining") as caught:
                client.generate(PROMPT, SHORT)
            assert caught.value.retry_after_s > 0
            chunks = list(stream)
        assert sum(len(chunk.token_ids) for chunk in chunks) == 1500
        assert chunks[-1].finish_reason == "length"
        assert server.process.wait(5) == 0
        watcher.join(5)
        assert not watcher.is_alive()


def test_ctrl_c_twice_ends_at_once_and_both_processes_log_json(root: Path, adapters: dict[str, Path]) -> None:
    arguments = ["--log-format", "json", "--adapter", f"a={adapters['all']}"]
    with serve(tiny_base(root), root / "hurry.log", *arguments) as server, Client(server.address) as client:
        children = psutil.Process(server.process.pid).children()
        with running(client) as stream:
            server.process.send_signal(signal.SIGINT)
            until(lambda: statuses(server.address) == {"NOT_SERVING"})
            asked = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            with pytest.raises(ServerError):
                list(stream)
            assert server.process.wait(10) == 0
            assert time.monotonic() - asked < 3.0
        assert all(gone(child) for child in children)
        entries = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
        assert any("draining: 1 calls" in entry["message"] for entry in entries)
        assert any(entry["logger"] == "loraplex.adapters" for entry in entries), "the engine did not log as asked"
        assert not any(line[:4].isdigit() for line in server.log.splitlines()), "a line of the text format"
