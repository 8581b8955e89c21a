"""Every Prometheus metric of a server, in a registry of its own. Nothing else imports ``prometheus_client``.

Fed by ``observe_step`` (one engine step) and by one ``RequestMeter`` per request. Gauges are not kept: a scrape reads
them from the last step report. The ``adapter`` label is ``base``, or an adapter in use, or ``other`` beyond
``MAX_ADAPTER_LABELS`` names.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loraplex import __version__
from loraplex.engine.messages import AdapterGauges, StepReport
from loraplex.errors import InvalidConfig
from loraplex.types import AdapterState, ModelInfo, Usage

BASE_LABEL: Final = "base"
OTHER_LABEL: Final = "other"
MAX_ADAPTER_LABELS: Final = 200

_LATENCY_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_STEP_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_TOKENS_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_COUNT_BUCKETS: Final = (0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)


class Metrics:
    """The metrics of one server. Counting is for the event loop; a scrape may come from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._labels: dict[str, _Series] = {}
        self._report = StepReport()
        self._gauges = AdapterGauges()
        self._max_lora = 0
        by_adapter = ("adapter",)
        self._requests = self._counter(
            "loraplex_requests", "Requests that ended, by status code", (*by_adapter, "code")
        )
        self._prompt_tokens = self._counter("loraplex_prompt_tokens", "Prompt tokens of ended requests", by_adapter)
        self._cached_tokens = self._counter(
            "loraplex_cached_prompt_tokens", "Prompt tokens that the prefix cache already held", by_adapter
        )
        self._generation_tokens = self._counter("loraplex_generation_tokens", "Tokens generated", by_adapter)
        self._queue_time = self._latency("loraplex_queue_time_seconds", "From arrival to the first step")
        self._ttft = self._latency("loraplex_time_to_first_token_seconds", "From arrival to the first token")
        self._itl = self._latency("loraplex_inter_token_latency_seconds", "Between tokens of a sequence")
        self._e2e = self._latency("loraplex_e2e_latency_seconds", "From arrival to the end")
        self._step_seconds = Histogram(
            "loraplex_step_seconds",
            "Engine steps by what they held: prefill, decode or mixed",
            ("phase",),
            registry=self.registry,
            buckets=_STEP_BUCKETS,
        )
        self._step_tokens = self._sizes("loraplex_step_tokens", "Tokens in a step", _TOKENS_BUCKETS)
        self._step_sequences = self._sizes("loraplex_step_sequences", "Sequences in a step", _COUNT_BUCKETS)
        self._step_adapters = self._sizes(
            "loraplex_step_adapters", "Distinct adapters in a step, the base not counted", _COUNT_BUCKETS
        )
        self._load_seconds = Histogram(
            "loraplex_adapter_load_seconds",
            "Adapter loads by the tier reached: host (source to servable), device (upload)",
            ("tier",),
            registry=self.registry,
            buckets=_LATENCY_BUCKETS,
        )
        self._restarts = Counter(
            "loraplex_engine_restarts",
            "Times that the engine died and was started anew",
            registry=self.registry,
        )
        self.registry.register(_ReportCollector(self))

    def set_model(self, model: ModelInfo) -> None:
        """Publish ``loraplex_build_info`` once the model is known."""
        self._max_lora = model.max_num_seqs
        info = Gauge(
            "loraplex_build_info",
            "1, with what is served as labels",
            ("version", "model", "architecture", "dtype", "quantization", "tensor_parallel_size", "lora_backend"),
            registry=self.registry,
        )
        info.labels(
            version=__version__,
            model=model.model_id,
            architecture=model.architecture,
            dtype=model.dtype,
            quantization=model.quantization,
            tensor_parallel_size=str(model.tensor_parallel_size),
            lora_backend=model.backends.get("lora", ""),
        ).set(1)

    def observe_step(self, report: StepReport) -> None:
        """Count one step, and keep its gauges for the next scrape. A heartbeat has no sequences and is no step."""
        self._report = report
        self._gauges = report.gauges or self._gauges
        for seconds in report.upload_s:
            self._load_seconds.labels("device").observe(seconds)
        if report.sequences == 0:
            return
        phase = "mixed" if report.prefill_tokens and report.decode_tokens else "decode"
        if not report.decode_tokens:
            phase = "prefill"
        self._step_seconds.labels(phase).observe(report.step_s)
        self._step_tokens.observe(report.prefill_tokens + report.decode_tokens)
        self._step_sequences.observe(report.sequences)
        self._step_adapters.observe(report.adapters)

    def engine_is_gone(self) -> None:
        """What the engine held and ran, it holds and runs no more."""
        self._report = StepReport()
        self._gauges = AdapterGauges()

    def engine_restarted(self) -> None:
        """Count one engine that took a dead one's place."""
        self._restarts.inc()

    def observe_load(self, seconds: float) -> None:
        """Count one adapter load, source to servable."""
        self._load_seconds.labels("host").observe(seconds)

    def request(self) -> RequestMeter:
        """Begin to measure one request."""
        return RequestMeter(self)

    def adapter_label(self, name: str, *, exists: bool) -> str:
        """The label of an adapter: its name if it has one or may get one. A name that is not loaded gets none."""
        if name == BASE_LABEL or name in self._labels:
            return name
        if not exists:
            return OTHER_LABEL
        if len(self._labels) >= MAX_ADAPTER_LABELS:
            self._reclaim()
        if len(self._labels) >= MAX_ADAPTER_LABELS:
            return OTHER_LABEL
        self.series(name)
        return name

    def series(self, label: str) -> _Series:
        """The per-adapter series of ``label``, looked up once per label."""
        known = self._labels.get(label)
        if known is None:
            known = self._labels[label] = _Series(self, label)
        return known

    def count_request(self, label: str, code: str) -> None:
        """Count one ended request."""
        self._requests.labels(label, code).inc()

    def _reclaim(self) -> None:
        """Drop the series of adapters that the engine holds no more, to make room for those it does."""
        gauges = self._gauges
        held = {BASE_LABEL, OTHER_LABEL, *gauges.on_device, *gauges.on_host, *gauges.running}
        for label in [label for label in self._labels if label not in held]:
            del self._labels[label]
            for family in (self._prompt_tokens, self._cached_tokens, self._generation_tokens):
                family.remove(label)
            for histogram in (self._queue_time, self._ttft, self._itl, self._e2e):
                histogram.remove(label)
            self._requests.remove_by_labels({"adapter": label})

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _latency(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ("adapter",), registry=self.registry, buckets=_LATENCY_BUCKETS)

    def _sizes(self, name: str, text: str, buckets: tuple[int, ...]) -> Histogram:
        return Histogram(name, text, registry=self.registry, buckets=buckets)


class RequestMeter:
    """Measures one request from its arrival to its end."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._label = BASE_LABEL
        self._series: _Series | None = None
        self._last_token_at = 0.0
        self._num_tokens = 0
        self.arrived_at = time.monotonic()
        self.ttft_s = 0.0
        #: filled in when the request ends well
        self.usage = Usage()

    def named(self, names: tuple[str, ...], *, exist: bool) -> None:
        """Say which adapters the request uses; ``exist`` once the engine has resolved them.

        Several adapters in one request share the label of their names joined by ``+``, in one order: it is one sum.
        """
        self._label = self._metrics.adapter_label("+".join(sorted(names)) or BASE_LABEL, exists=exist)
        self._series = self._metrics.series(self._label) if exist else None

    def tokens(self, num: int) -> None:
        """Count tokens that have just come."""
        series = self._series
        if series is None or num == 0:
            return
        now = time.monotonic()
        if self._num_tokens == 0:
            self.ttft_s = now - self.arrived_at
            series.ttft.observe(self.ttft_s)
            num_gaps = num - 1
            gap_s = 0.0
        else:
            num_gaps = num
            gap_s = (now - self._last_token_at) / num
        for _ in range(num_gaps):
            series.itl.observe(gap_s)
        self._num_tokens += num
        self._last_token_at = now

    def end(self, code: str) -> None:
        """Count the request's end."""
        self._metrics.count_request(self._label, code)
        series = self._series
        if series is None:
            return
        series.prompt_tokens.inc(self.usage.prompt_tokens)
        series.cached_tokens.inc(self.usage.cached_prompt_tokens)
        series.generation_tokens.inc(self._num_tokens)
        series.queue_time.observe(self.usage.queue_s)
        series.e2e.observe(time.monotonic() - self.arrived_at)


class MetricsServer:
    """The HTTP exposition at ``/metrics``; port 0 takes a free one."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=metrics.registry)
        except OSError as error:
            raise InvalidConfig(
                f"metrics port: cannot listen on {host}:{port}: {error.strerror}", field="metrics_port"
            ) from error
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Series:
    """The metrics of one adapter label, looked up once."""

    __slots__ = (
        "cached_tokens",
        "e2e",
        "generation_tokens",
        "itl",
        "prompt_tokens",
        "queue_time",
        "ttft",
    )

    def __init__(self, metrics: Metrics, label: str) -> None:
        self.prompt_tokens = metrics._prompt_tokens.labels(label)
        self.cached_tokens = metrics._cached_tokens.labels(label)
        self.generation_tokens = metrics._generation_tokens.labels(label)
        self.queue_time = metrics._queue_time.labels(label)
        self.ttft = metrics._ttft.labels(label)
        self.itl = metrics._itl.labels(label)
        self.e2e = metrics._e2e.labels(label)


class _ReportCollector(Collector):
    """The engine's gauges, read from its last report when a scrape asks."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def collect(self) -> Iterable[Metric]:
        report, gauges = self._metrics._report, self._metrics._gauges
        yield GaugeMetricFamily("loraplex_requests_running", "Requests with a place in the batch", report.running)
        yield GaugeMetricFamily("loraplex_requests_waiting", "Requests that wait for one", report.waiting)
        yield CounterMetricFamily("loraplex_preemptions", "Sequences put back for want of pages", report.preemptions)
        pages = {"used": report.kv_pages_used, "cached": report.kv_pages_cached, "free": report.kv_pages_free}
        yield _by("loraplex_kv_pages", "KV cache pages", "state", pages)
        slots = {"used": report.state_slots_used, "cached": report.state_slots_cached, "free": report.state_slots_free}
        yield _by("loraplex_state_slots", "Slots of states, those of snapshots as cached", "state", slots)
        states = {state.value: gauges.states.get(state.value, 0) for state in AdapterState}
        yield _by("loraplex_adapters", "Adapters by state", "state", states)
        held = {"device": gauges.device_bytes, "host": gauges.host_bytes}
        yield _by("loraplex_adapter_bytes", "Bytes of adapters held", "tier", held)
        evictions = CounterMetricFamily("loraplex_adapter_evictions", "Adapters put out of a tier", labels=["tier"])
        evictions.add_metric(["device"], gauges.evictions)
        yield evictions
        yield self._resident(gauges)
        yield self._lora_requests(gauges)

    def _resident(self, gauges: AdapterGauges) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "loraplex_adapter_resident", "1 for each tier that holds the adapter", labels=["adapter", "tier"]
        )
        for tier, names in (("device", gauges.on_device), ("host", gauges.on_host)):
            for name in names[:MAX_ADAPTER_LABELS]:
                family.add_metric([name, tier], 1)
            if len(names) > MAX_ADAPTER_LABELS:
                family.add_metric([OTHER_LABEL, tier], len(names) - MAX_ADAPTER_LABELS)
        return family

    def _lora_requests(self, gauges: AdapterGauges) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "lora_requests_info",
            "Unix time of this scrape; the labels list adapters with running and waiting requests",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        names = [",".join(group[:MAX_ADAPTER_LABELS]) for group in (gauges.running, gauges.waiting)]
        family.add_metric([str(self._metrics._max_lora), *names], time.time())
        return family


def _by(name: str, text: str, label: str, values: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
