"""AdapterService: load, unload, list, get, pin and watch; what is not built yet answers UNIMPLEMENTED."""

from __future__ import annotations

import contextlib

from loraplex.errors import UnsupportedFeature
from loraplex.rpc import convert_adapters as convert
from loraplex.rpc.feed import StreamWriter
from loraplex.rpc.serving import Serving
from loraplex.rpc.status import Context, guarded
from loraplex.types import AdapterInfo
from loraplex_proto.v1 import adapters_pb2, adapters_pb2_grpc


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """The life of adapters on this server."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def LoadAdapter(self, request: adapters_pb2.LoadAdapterRequest, context: Context) -> adapters_pb2.Adapter:
        async with guarded(context):
            with self._serving.gate.enter():
                return self._message(await self._serving.engine.load_adapter(*convert.load_adapter(request)))
        raise AssertionError("guarded ends every failed call")

    async def UnloadAdapter(self, request: adapters_pb2.UnloadAdapterRequest, context: Context) -> adapters_pb2.Adapter:
        async with guarded(context):
            with self._serving.gate.enter():
                return self._message(await self._serving.engine.unload_adapter(*convert.unload_adapter(request)))
        raise AssertionError("guarded ends every failed call")

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Context
    ) -> adapters_pb2.ListAdaptersResponse:
        async with guarded(context):
            with self._serving.gate.enter():
                infos = await self._serving.engine.list_adapters()
                return adapters_pb2.ListAdaptersResponse(adapters=map(self._message, infos))
        raise AssertionError("guarded ends every failed call")

    async def GetAdapter(self, request: adapters_pb2.GetAdapterRequest, context: Context) -> adapters_pb2.Adapter:
        async with guarded(context):
            with self._serving.gate.enter():
                return self._message(await self._serving.engine.get_adapter(convert.adapter_name(request)))
        raise AssertionError("guarded ends every failed call")

    async def WatchAdapters(self, request: adapters_pb2.WatchAdaptersRequest, context: Context) -> None:
        """Runs until the caller ends it or the server stops; a drain does not wait for it."""
        async with guarded(context):
            with self._serving.gate.enter():
                events = self._serving.engine.watch_adapters()
            writer = StreamWriter(context)
            async with contextlib.aclosing(events):
                await writer.open()
                async for info in events:
                    await writer.write(adapters_pb2.AdapterEvent(adapter=self._message(info)))

    async def UpdateAdapter(self, request: adapters_pb2.UpdateAdapterRequest, context: Context) -> adapters_pb2.Adapter:
        async with guarded(context):
            with self._serving.gate.enter():
                return self._message(await self._serving.engine.pin_adapter(*convert.update_adapter(request)))
        raise AssertionError("guarded ends every failed call")

    async def MergeAdapters(self, request: adapters_pb2.MergeAdaptersRequest, context: Context) -> adapters_pb2.Adapter:
        async with guarded(context):
            raise _not_built("MergeAdapters")
        raise AssertionError("guarded ends every failed call")

    async def ExportAdapter(self, request: adapters_pb2.ExportAdapterRequest, context: Context) -> None:
        async with guarded(context):
            raise _not_built("ExportAdapter")

    def _message(self, info: AdapterInfo) -> adapters_pb2.Adapter:
        return convert.adapter(info, self._serving.engine.model)


def _not_built(rpc: str) -> UnsupportedFeature:
    return UnsupportedFeature(f"{rpc} is not implemented by this server version; see the release notes for when it is")
