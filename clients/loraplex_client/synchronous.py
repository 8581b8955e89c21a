"""The synchronous client: one channel, safe to share between threads."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from types import TracebackType

import grpc

from loraplex_client import requests, results
from loraplex_client.requests import GREEDY, Adapters, Message, Params, Prompt
from loraplex_client.transport import CHANNEL_OPTIONS, DEFAULT_ADDRESS, from_sync
from loraplex_proto.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)


class Client:
    """A Loraplex server. Every method raises a ``ServerError``; ``timeout`` is in seconds, None for no limit.

    Example::

        with Client() as client:
            client.load_adapter("fr", "/adapters/fr")
            print(client.generate("Good morning", adapters="fr").text)
            for chunk in client.stream("Tell me a story", Params(max_tokens=200)):
                print(chunk.text, end="", flush=True)
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._adapters = adapters_pb2_grpc.AdapterServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in progress end."""
        self._channel.close()

    def generate(
        self, prompt: Prompt, params: Params = GREEDY, *, adapters: Adapters = "", timeout: float | None = None
    ) -> results.Result:
        """The whole answer to ``prompt``.

        Example::

            client.generate("2 + 2 =", Params(max_tokens=4)).text
            client.generate([Message("user", "Hello")], adapters={"polite": 0.7, "fr": 0.3})
        """
        request = requests.generate_request(prompt, params, adapters)
        with _raising():
            return results.result(self._generation.Generate(request, timeout=timeout))

    def stream(
        self, prompt: Prompt, params: Params = GREEDY, *, adapters: Adapters = "", timeout: float | None = None
    ) -> Generator[results.Chunk]:
        """The answer piece by piece. Closing the generator, or leaving its loop, cancels the request on the server."""
        request = requests.generate_request(prompt, params, adapters)
        call = self._generation.GenerateStream(request, timeout=timeout)
        try:
            with _raising():
                for pb in call:
                    yield results.chunk(pb)
        finally:
            call.cancel()

    def tokenize(
        self, prompt: str | Sequence[Message], *, adapters: Adapters = "", timeout: float | None = None
    ) -> tuple[int, ...]:
        """The token ids that ``prompt`` becomes on this server; adapters may bring a tokenizer of their own."""
        with _raising():
            response = self._generation.Tokenize(requests.tokenize_request(prompt, adapters), timeout=timeout)
        return tuple(response.token_ids)

    def load_adapter(
        self, name: str, source: str, *, pinned: bool = False, replace: bool = False, timeout: float | None = None
    ) -> results.Adapter:
        """Load an adapter; returns when it can be served.

        Example::

            client.load_adapter("fr", "/adapters/fr-v2", replace=True)
        """
        request = requests.load_request(name, source, pinned, replace)
        with _raising():
            return results.adapter(self._adapters.LoadAdapter(request, timeout=timeout))

    def unload_adapter(self, name: str, *, abort: bool = False, timeout: float | None = None) -> results.Adapter:
        """Unload an adapter; its running requests finish first, or are ended with ``abort``."""
        with _raising():
            return results.adapter(self._adapters.UnloadAdapter(requests.unload_request(name, abort), timeout=timeout))

    def pin_adapter(self, name: str, *, pinned: bool = True, timeout: float | None = None) -> results.Adapter:
        """Keep an adapter in device memory whatever else is asked for; with ``pinned=False``, no longer."""
        with _raising():
            response = self._adapters.UpdateAdapter(requests.pin_request(name, pinned), timeout=timeout)
        return results.adapter(response)

    def list_adapters(self, *, timeout: float | None = None) -> tuple[results.Adapter, ...]:
        """All adapters, by name."""
        with _raising():
            response = self._adapters.ListAdapters(adapters_pb2.ListAdaptersRequest(), timeout=timeout)
        return tuple(map(results.adapter, response.adapters))

    def get_adapter(self, name: str, *, timeout: float | None = None) -> results.Adapter:
        """One adapter."""
        with _raising():
            return results.adapter(
                self._adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name=name), timeout=timeout)
            )

    def watch_adapters(self, *, timeout: float | None = None) -> Generator[results.Adapter]:
        """Every adapter as it stands, then each change as it happens. Close the generator to end it."""
        call = self._adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest(), timeout=timeout)
        try:
            with _raising():
                for event in call:
                    yield results.adapter(event.adapter)
        finally:
            call.cancel()

    def model(self, *, timeout: float | None = None) -> results.Model:
        """The base model and the server's limits."""
        with _raising():
            return results.model(self._models.GetModel(model_pb2.GetModelRequest(), timeout=timeout))


@contextlib.contextmanager
def _raising() -> Iterator[None]:
    """Turn gRPC's errors into ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_sync(error) from None
