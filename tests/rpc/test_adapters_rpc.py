"""AdapterService and ModelService through real gRPC."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from loraplex import __version__
from loraplex_proto.v1 import adapters_pb2, model_pb2
from loraplex_proto.v1.adapters_pb2 import LoadAdapterRequest
from tests.rpc.serving import serving


def test_load_get_list_replace_unload() -> None:
    async def main() -> None:
        async with serving() as server:
            stub = server.adapters
            loaded = await stub.LoadAdapter(LoadAdapterRequest(name="fr", source="/a/fr", pinned=True))
            assert (loaded.name, loaded.uid, loaded.state, loaded.pinned) == (
                "fr",
                "uid-fr-1",
                adapters_pb2.READY,
                True,
            )
            assert dict(loaded.coverage.sites) == {"q_proj": 2}
            assert (loaded.loaded_at.seconds, loaded.loaded_at.nanos) == (1_700_000_000, 500_000_000)
            assert not loaded.HasField("last_used_at")
            assert loaded.residency == adapters_pb2.DEVICE
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.LoadAdapter(LoadAdapterRequest(name="fr", source="/a/fr2"))
            assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS
            replaced = await stub.LoadAdapter(
                LoadAdapterRequest(name="fr", source="/a/fr2", on_conflict=adapters_pb2.REPLACE)
            )
            assert (replaced.generation, replaced.uid) == (2, "uid-fr-2")
            assert await stub.GetAdapter(adapters_pb2.GetAdapterRequest(name="fr")) == replaced
            await stub.LoadAdapter(LoadAdapterRequest(name="b", source="/a/b"))
            listed = await stub.ListAdapters(adapters_pb2.ListAdaptersRequest())
            assert [adapter.name for adapter in listed.adapters] == ["b", "fr"]
            gone = await stub.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="fr"))
            assert gone.state == adapters_pb2.UNLOADED
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await stub.GetAdapter(adapters_pb2.GetAdapterRequest(name="bb"))
            assert "did you mean 'b'?" in (unknown.value.details() or "")

    asyncio.run(main())


def test_watch_tells_the_present_and_then_each_change() -> None:
    async def main() -> None:
        async with serving() as server:
            await server.adapters.LoadAdapter(LoadAdapterRequest(name="old", source="/old"))
            watch = server.adapters.WatchAdapters(adapters_pb2.WatchAdaptersRequest())
            assert (await watch.read()).adapter.name == "old"
            await server.adapters.LoadAdapter(LoadAdapterRequest(name="new", source="/new"))
            assert (await watch.read()).adapter.name == "new"
            await server.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name="old"))
            event = (await watch.read()).adapter
            assert (event.name, event.state) == ("old", adapters_pb2.UNLOADED)
            watch.cancel()

    asyncio.run(main())


def test_get_model() -> None:
    async def main() -> model_pb2.Model:
        async with serving() as server:
            return await server.model.GetModel(model_pb2.GetModelRequest())

    model = asyncio.run(main())
    assert (model.id, model.architecture, model.vocab_size, model.max_model_len) == ("fake", "llama", 300, 256)
    assert dict(model.backends) == {"lora": "reference", "attention": "reference"}
    assert list(model.sites) == ["q_proj", "v_proj"]
    assert (model.limits.max_num_seqs, model.limits.max_logprobs, model.limits.max_prompt_bytes) == (8, 20, 1 << 20)
    assert model.server_version == __version__
