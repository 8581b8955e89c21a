"""ModelService: what this server serves."""

from __future__ import annotations

from loraplex.rpc import convert
from loraplex.rpc.serving import Serving
from loraplex.rpc.status import Context, guarded
from loraplex_proto.v1 import model_pb2, model_pb2_grpc


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """GetModel. Answers while draining too: it does no work."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def GetModel(self, request: model_pb2.GetModelRequest, context: Context) -> model_pb2.Model:
        async with guarded(context):
            return convert.model(self._serving.engine.model)
        raise AssertionError("guarded ends every failed call")
