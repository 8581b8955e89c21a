"""The gRPC server: options, services, health, reflection, and how it ends. Knows no request."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loraplex.config import ServerConfig
from loraplex.engine.handle import EngineHandle
from loraplex.errors import InvalidConfig
from loraplex.metrics import Metrics
from loraplex.rpc.adapters import AdapterService
from loraplex.rpc.gate import Gate
from loraplex.rpc.generate import GenerationService
from loraplex.rpc.model import ModelService
from loraplex.rpc.serving import Serving
from loraplex.text.adapter_text import AdapterTexts
from loraplex.text.tokenizer import Tokenizer
from loraplex_proto.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)

logger = logging.getLogger(__name__)

SERVICES: Final = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
)
#: calls that the transport takes in before ours says RESOURCE_EXHAUSTED; the default loses calls in a burst
_MAX_PENDING: Final = 20_000
#: what is cut off at the end of a drain gets this long to hear of it
_LAST_GRACE_S: Final = 0.5


class App:
    """A serving gRPC server over one engine. Owned by the event loop it was made in."""

    def __init__(self, config: ServerConfig, engine: EngineHandle, tokenizer: Tokenizer, metrics: Metrics) -> None:
        self._config = config
        self._gate = Gate(config.max_concurrent_streams)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._death = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = grpc.aio.server(options=_options(config))
        self._engine = engine
        self._metrics = metrics
        self._texts = AdapterTexts(tokenizer, engine.model, engine.text_spool)
        serving = Serving(engine, self._texts, metrics, self._gate, config.default_max_tokens)
        add = self._server
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(serving), add)  # type: ignore[no-untyped-call]
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterService(serving), add)  # type: ignore[no-untyped-call]
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(serving), add)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, add)
        if config.reflection:
            reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), add)
        engine.on_report(metrics.observe_step)
        engine.on_load(metrics.observe_load)
        engine.on_adapter(self._texts.changed)
        engine.on_death(self._engine_died)
        engine.on_restart(self._engine_is_down, self._engine_is_up)
        self.port = 0

    @property
    def address(self) -> str:
        """host:port that the server listens on."""
        return _address(self._config.host, self.port)

    async def start(self) -> None:
        """Listen and serve. Raises InvalidConfig, naming the address, when it cannot be listened on."""
        asked = _address(self._config.host, self._config.port)
        try:
            self.port = self._server.add_insecure_port(asked)
        except RuntimeError as error:
            raise InvalidConfig(f"port: cannot listen on {asked}: is it in use? ({error})", field="port") from error
        for info in await self._engine.list_adapters():  # those that were loaded before we listened for changes
            self._texts.changed(info)
        for service in SERVICES:
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT, then drain; a second signal ends the drain at once.

        Returns the exit code: 0, or 1 when the engine died. Later signals are left without an effect, because what
        follows is bounded and must be ended in order: an interrupted end would leave the engine's directory behind.
        """
        loop = asyncio.get_running_loop()
        asked_to_end = asyncio.Event()
        hurry = asyncio.Event()

        def on_signal() -> None:
            (hurry if asked_to_end.is_set() else asked_to_end).set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        await asked_to_end.wait()
        logger.info("draining: %d calls in progress, up to %g s", self._gate.num_inside, self._config.drain_s)
        drain = asyncio.create_task(self.drain())
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait({drain, hurried}, return_when=asyncio.FIRST_COMPLETED)
        if hurry.is_set():
            logger.warning("second signal: ending %d calls at once", self._gate.num_inside)
        for task in (drain, hurried):
            task.cancel()
        await asyncio.gather(drain, hurried, return_exceptions=True)
        await self.stop()
        return 1 if self._death else 0

    async def drain(self) -> None:
        """Refuse new work, say NOT_SERVING, and wait up to ``drain_s`` for the calls in progress."""
        self._gate.close("the server is draining; send the request to another one")
        await self._health.enter_graceful_shutdown()
        if not await self._gate.wait_empty(self._config.drain_s):
            logger.warning("%d calls still ran after %g s; ending them", self._gate.num_inside, self._config.drain_s)

    async def stop(self) -> None:
        """Stop listening and end what still runs."""
        self._gate.close("the server has stopped")
        await self._server.stop(_LAST_GRACE_S if self._gate.num_inside == 0 else 0)
        self._texts.close()

    def _engine_died(self, reason: str) -> None:
        self._death = reason or "unknown reason"
        logger.error("the engine died: %s", self._death)
        self._gate.close(f"the engine is gone ({self._death}); the server must be restarted")
        self._nothing_runs()

    def _engine_is_down(self, reason: str) -> None:
        self._gate.shut(f"the engine died ({reason}) and is being started anew")
        self._nothing_runs()

    def _nothing_runs(self) -> None:
        self._metrics.engine_is_gone()
        self._texts.engine_ended()
        self._say(health_pb2.HealthCheckResponse.NOT_SERVING)

    def _engine_is_up(self) -> None:
        self._metrics.engine_restarted()
        self._gate.open()
        self._say(health_pb2.HealthCheckResponse.SERVING)

    def _say(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        """Set the health of all services; a server that drains stays NOT_SERVING."""

        async def say() -> None:
            for service in ("", *SERVICES):
                await self._health.set(service, status)

        task = asyncio.get_running_loop().create_task(say())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    return [
        # A taken port is an error, not a second server behind the same address.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_concurrent_streams", config.max_concurrent_streams),
        ("grpc.server.max_pending_requests", _MAX_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING),
        # A frozen client is noticed within keepalive_time + ping_timeout; keepalive_timeout alone took a minute.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 2_000),
        ("grpc.http2.max_pings_without_data", 0),
        # Clients may ping an idle stream this often (a long wait for a first token is normal).
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ]


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
