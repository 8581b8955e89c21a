"""A scrape over HTTP parses, carries every name, and its adapter label stays bounded."""

from __future__ import annotations

import asyncio
import socket
import urllib.request
from collections.abc import Iterable

import grpc
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from loraplex.engine.messages import AdapterGauges, StepReport
from loraplex.errors import InvalidConfig
from loraplex.metrics import MAX_ADAPTER_LABELS, Metrics, MetricsServer
from loraplex_proto.v1 import adapters_pb2, generation_pb2
from loraplex_proto.v1.generation_pb2 import AdapterRef, GenerateRequest, StopRule
from tests.fakes import FAKE_MODEL, FakeEngine
from tests.rpc.serving import serving

NAMES = {
    "loraplex_engine_restarts",
    "loraplex_requests",
    "loraplex_requests_running",
    "loraplex_requests_waiting",
    "loraplex_prompt_tokens",
    "loraplex_generation_tokens",
    "loraplex_cached_prompt_tokens",
    "loraplex_queue_time_seconds",
    "loraplex_time_to_first_token_seconds",
    "loraplex_inter_token_latency_seconds",
    "loraplex_e2e_latency_seconds",
    "loraplex_step_seconds",
    "loraplex_step_tokens",
    "loraplex_step_sequences",
    "loraplex_step_adapters",
    "loraplex_kv_pages",
    "loraplex_state_slots",
    "loraplex_preemptions",
    "loraplex_adapters",
    "loraplex_adapter_resident",
    "loraplex_adapter_bytes",
    "loraplex_adapter_load_seconds",
    "loraplex_adapter_evictions",
    "loraplex_build_info",
    "lora_requests_info",
}
REPORT = StepReport(
    step_s=0.02,
    prefill_tokens=30,
    decode_tokens=3,
    sequences=4,
    adapters=2,
    running=4,
    waiting=5,
    kv_pages_used=6,
    kv_pages_cached=7,
    kv_pages_free=8,
    state_slots_used=13,
    state_slots_cached=14,
    state_slots_free=15,
    preemptions=9,
    upload_s=(0.5,),
    gauges=AdapterGauges(
        evictions=10,
        device_bytes=11,
        host_bytes=12,
        running=("fr", "sql"),
        waiting=("rhyme",),
        states={"ready": 3, "loading": 1},
        on_device=("fr", "sql"),
        on_host=("rhyme",),
    ),
)


def scrape(metrics: Metrics) -> dict[str, Metric]:
    server = MetricsServer(metrics, "127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as response:
            text = response.read().decode()
    finally:
        server.close()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: dict[str, Metric], family: str, sample: str = "", **labels: str) -> float:
    found = [
        item.value
        for item in families[family].samples
        if item.name == (sample or family) and labels.items() <= item.labels.items()
    ]
    assert len(found) == 1, (family, labels, families[family].samples)
    return float(found[0])


def test_every_name_and_what_it_counts() -> None:
    async def main() -> dict[str, Metric]:
        engine = FakeEngine()
        async with serving(engine) as server:
            await server.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(name="fr", source="/fr"))
            request = GenerateRequest(token_ids=generation_pb2.TokenIds(ids=[1, 2, 3]), stop=StopRule(max_tokens=5))
            await server.generation.Generate(request)
            request.adapters.append(AdapterRef(name="fr"))
            async for _ in server.generation.GenerateStream(request):
                pass
            for bad in (AdapterRef(name="nobody"), AdapterRef(name="b ad")):
                with pytest.raises(grpc.aio.AioRpcError):
                    await server.generation.Generate(GenerateRequest(text="x", adapters=[bad]))
            engine.report(REPORT)
            engine.report(StepReport(running=4, preemptions=9))
            engine.report(REPORT)
            return scrape(server.metrics)

    families = asyncio.run(main())
    assert families.keys() >= NAMES
    get = value
    assert get(families, "loraplex_requests", "loraplex_requests_total", adapter="base", code="OK") == 1
    assert get(families, "loraplex_requests", "loraplex_requests_total", adapter="fr", code="OK") == 1
    assert get(families, "loraplex_requests", "loraplex_requests_total", adapter="other", code="NOT_FOUND") == 1
    assert get(families, "loraplex_requests", "loraplex_requests_total", adapter="base", code="INVALID_ARGUMENT") == 1
    assert get(families, "loraplex_prompt_tokens", "loraplex_prompt_tokens_total", adapter="fr") == 3
    assert get(families, "loraplex_generation_tokens", "loraplex_generation_tokens_total", adapter="fr") == 5
    assert get(families, "loraplex_cached_prompt_tokens", "loraplex_cached_prompt_tokens_total", adapter="fr") == 2
    for name in ("queue_time", "time_to_first_token", "e2e_latency"):
        assert get(families, f"loraplex_{name}_seconds", f"loraplex_{name}_seconds_count", adapter="fr") == 1
    itl = "loraplex_inter_token_latency_seconds"
    assert get(families, itl, f"{itl}_count", adapter="fr") == 4
    assert get(families, "loraplex_step_seconds", "loraplex_step_seconds_count", phase="mixed") == 2
    assert get(families, "loraplex_step_tokens", "loraplex_step_tokens_sum") == 66
    assert get(families, "loraplex_step_adapters", "loraplex_step_adapters_bucket", le="2.0") == 2
    assert get(families, "loraplex_step_adapters", "loraplex_step_adapters_bucket", le="1.0") == 0
    assert get(families, "loraplex_requests_running") == 4
    assert get(families, "loraplex_requests_waiting") == 5
    assert get(families, "loraplex_kv_pages", state="free") == 8
    assert [get(families, "loraplex_state_slots", state=s) for s in ("used", "cached", "free")] == [13, 14, 15]
    assert get(families, "loraplex_preemptions", "loraplex_preemptions_total") == 9
    assert get(families, "loraplex_adapters", state="ready") == 3
    assert get(families, "loraplex_adapters", state="failed") == 0
    assert get(families, "loraplex_adapter_resident", adapter="rhyme", tier="host") == 1
    assert get(families, "loraplex_adapter_bytes", tier="device") == 11
    assert get(families, "loraplex_adapter_evictions", "loraplex_adapter_evictions_total", tier="device") == 10
    load = "loraplex_adapter_load_seconds"
    assert get(families, load, f"{load}_sum", tier="host") == 0.25
    assert get(families, load, f"{load}_count", tier="device") == 2
    info = families["loraplex_build_info"].samples[0].labels
    assert (info["model"], info["architecture"], info["lora_backend"]) == ("fake", "llama", "reference")
    lora = families["lora_requests_info"].samples[0]
    assert lora.labels == {
        "max_lora": "8",
        "running_lora_adapters": "fr,sql",
        "waiting_lora_adapters": "rhyme",
    }
    assert lora.value > 1_700_000_000


def test_adapter_label_is_bounded_and_forgets_what_is_gone() -> None:
    metrics = Metrics()

    def used(names: Iterable[str]) -> None:
        for name in names:
            meter = metrics.request()
            meter.named((name,), exist=True)
            meter.tokens(1)
            meter.end("OK")

    def labels() -> set[str]:
        return {sample.labels["adapter"] for sample in scrape(metrics)["loraplex_requests"].samples}

    first = [f"a{index}" for index in range(MAX_ADAPTER_LABELS)]
    metrics.observe_step(StepReport(gauges=AdapterGauges(on_device=tuple(first))))
    used([*first, "late", "later"])
    assert labels() == {*first, "other"}
    metrics.observe_step(StepReport(gauges=AdapterGauges(on_device=tuple(first[:10]), on_host=("new",))))
    used(["new"])
    assert labels() == {*first[:10], "new", "other"}


def test_a_report_of_thousands_of_adapters_stays_bounded() -> None:
    metrics = Metrics()
    names = tuple(f"a{index}" for index in range(5000))
    metrics.observe_step(StepReport(gauges=AdapterGauges(on_host=names, waiting=names)))
    families = scrape(metrics)
    resident = families["loraplex_adapter_resident"].samples
    assert len(resident) == MAX_ADAPTER_LABELS + 1
    assert sum(sample.value for sample in resident) == 5000
    waiting = families["lora_requests_info"].samples[0].labels["waiting_lora_adapters"]
    assert len(waiting.split(",")) == MAX_ADAPTER_LABELS


def test_two_servers_share_no_state_and_a_taken_port_is_named() -> None:
    one, other = Metrics(), Metrics()
    one.set_model(FAKE_MODEL)
    other.set_model(FAKE_MODEL)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidConfig, match=f"metrics port: cannot listen on 127.0.0.1:{port}"):
            MetricsServer(one, "127.0.0.1", port)


def test_a_sum_has_one_label_in_whatever_order_it_is_asked_for() -> None:
    metrics = Metrics()
    for names in (("sql", "fr"), ("fr", "sql")):
        meter = metrics.request()
        meter.named(names, exist=True)
        meter.end("OK")
    assert value(scrape(metrics), "loraplex_requests", "loraplex_requests_total", adapter="fr+sql") == 2
