"""AdapterService: load, merge, export, unload, list, get, pin and watch."""

from __future__ import annotations

import contextlib
import time

from loraplex.rpc import convert_adapters as convert
from loraplex.rpc.feed import StreamWriter
from loraplex.rpc.serving import Serving
from loraplex.rpc.status import Context, guarded
from loraplex.types import AdapterInfo, ResidentMode
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
                return self._message(await self._updated(*convert.update_adapter(request)))
        raise AssertionError("guarded ends every failed call")

    async def _updated(self, name: str, pinned: bool | None, mode: ResidentMode | None) -> AdapterInfo:
        engine = self._serving.engine
        if mode is not None:
            info = await engine.set_resident_mode(name, mode)
        if pinned is not None:
            info = await engine.pin_adapter(name, pinned)
        return info

    async def MergeAdapters(self, request: adapters_pb2.MergeAdaptersRequest, context: Context) -> adapters_pb2.Adapter:
        async with guarded(context):
            with self._serving.gate.enter():
                asked = convert.merge_adapters(request)
                info = await self._serving.engine.merge_adapters(
                    asked.name, asked.inputs, asked.options, asked.pinned, asked.on_conflict
                )
                return self._message(info)
        raise AssertionError("guarded ends every failed call")

    async def ExportAdapter(self, request: adapters_pb2.ExportAdapterRequest, context: Context) -> None:
        """A caller that goes away gives its export up."""
        async with guarded(context):
            with self._serving.gate.enter():
                asked = convert.export_adapter(request)
                progress = self._serving.engine.export_adapter(
                    asked.name, asked.destination, asked.format, asked.max_shard_bytes, asked.quantization
                )
                writer, began_s = StreamWriter(context), time.monotonic()
                async with contextlib.aclosing(progress):
                    await writer.open()
                    async for each in progress:
                        await writer.write(convert.export_progress(each))
                self._serving.metrics.observe_export(asked.format, time.monotonic() - began_s)

    def _message(self, info: AdapterInfo) -> adapters_pb2.Adapter:
        return convert.adapter(info, self._serving.engine.model)
