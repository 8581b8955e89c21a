"""A server with a fake engine on a loopback port, for tests through real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass

import grpc
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from loraplex.config import ServerConfig
from loraplex.metrics import Metrics
from loraplex.rpc.app import App
from loraplex.text.chat import ChatTemplate
from loraplex.text.tokenizer import ModelTokenizer, NoTokenizer, Tokenizer
from loraplex_proto.v1 import adapters_pb2_grpc, generation_pb2_grpc, model_pb2_grpc
from tests.fakes import FakeEngine

CONFIG = ServerConfig(port=0, metrics_port=0, drain_s=5.0, default_max_tokens=8)


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@functools.cache
def backend() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    return tokenizer


def make_tokenizer() -> Tokenizer:
    return ModelTokenizer(backend(), ChatTemplate(TEMPLATE, {}))


def ids_of(text: str) -> list[int]:
    return list(backend().encode(text).ids)


@dataclass(frozen=True)
class Served:
    """A running server and stubs on one channel to it."""

    app: App
    engine: FakeEngine
    metrics: Metrics
    channel: grpc.aio.Channel

    @property
    def generation(self) -> generation_pb2_grpc.GenerationServiceAsyncStub:
        return generation_pb2_grpc.GenerationServiceStub(self.channel)

    @property
    def adapters(self) -> adapters_pb2_grpc.AdapterServiceAsyncStub:
        return adapters_pb2_grpc.AdapterServiceStub(self.channel)

    @property
    def model(self) -> model_pb2_grpc.ModelServiceAsyncStub:
        return model_pb2_grpc.ModelServiceStub(self.channel)


@contextlib.asynccontextmanager
async def serving(
    engine: FakeEngine | None = None, config: ServerConfig = CONFIG, tokenizer: Tokenizer | None = None
) -> AsyncIterator[Served]:
    engine = engine or FakeEngine()
    metrics = Metrics()
    metrics.set_model(engine.model)
    app = App(config, engine, tokenizer or make_tokenizer(), metrics)
    await app.start()
    async with grpc.aio.insecure_channel(app.address) as channel:
        try:
            yield Served(app, engine, metrics, channel)
        finally:
            await app.stop()


@contextlib.contextmanager
def serving_thread(engine: FakeEngine | None = None) -> Iterator[Served]:
    """The same in a thread of its own, for synchronous clients. The channel belongs to that thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    context = serving(engine)

    def run(coroutine: Coroutine[None, None, Served]) -> Served:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    try:
        yield run(context.__aenter__())  # type: ignore[arg-type]
    finally:
        run(context.__aexit__(None, None, None))  # type: ignore[arg-type]
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def without_tokenizer() -> Tokenizer:
    return NoTokenizer()
