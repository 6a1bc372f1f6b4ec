"""The V2 service, `inference.GRPCInferenceService`: each RPC converts, calls `Catalogue` or `Control`, converts back.

ModelInfer and ModelStreamInfer are forwarded as bytes: see `relay` and `stream_caller`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb

from gateway.api.calls import Context, access_of, with_errors
from gateway.api.catalogue import Catalogue
from gateway.api.control import RPCS, Control
from gateway.forwarding.metadata import passed_on
from gateway.upstream.ask import TIMEOUT, Asker
from gateway.v2.names import SERVICE_NAME


@dataclass(frozen=True, slots=True)
class V2Service:
    """The 18 RPCs that are not inference."""

    catalogue: Catalogue
    control: Control
    is_ready: Callable[[], bool]

    def handlers(self) -> grpc.GenericRpcHandler:
        """The handlers, for `server.add_generic_rpc_handlers`."""
        methods = {
            "ServerLive": _typed(self._server_live, pb.ServerLiveRequest),
            "ServerReady": _typed(self._server_ready, pb.ServerReadyRequest),
            "ModelReady": _typed(self._model_ready, pb.ModelReadyRequest),
            "ServerMetadata": _typed(self._server_metadata, pb.ServerMetadataRequest),
            "ModelMetadata": _typed(self._model_metadata, pb.ModelMetadataRequest),
            "ModelConfig": _typed(self._model_config, pb.ModelConfigRequest),
            "ModelStatistics": _typed(self._model_statistics, pb.ModelStatisticsRequest),
            "RepositoryIndex": _typed(self._repository_index, pb.RepositoryIndexRequest),
        }
        for name, rpc in RPCS.items():
            methods[name] = _typed(self._controlled(name), rpc.request)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    # The server

    async def _server_live(self, request: Any, context: Context) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, request: Any, context: Context) -> Any:
        return pb.ServerReadyResponse(ready=self.is_ready())

    async def _server_metadata(self, request: Any, context: Context) -> Any:
        return await self._seen(context).server_metadata(_asker(context))

    # Models

    async def _model_ready(self, request: Any, context: Context) -> Any:
        return pb.ModelReadyResponse(
            ready=await self._seen(context).model_ready(request.name, request.version, _asker(context))
        )

    async def _model_metadata(self, request: Any, context: Context) -> Any:
        return await self._seen(context).model_metadata(request.name, request.version, _asker(context))

    async def _model_config(self, request: Any, context: Context) -> Any:
        return await self._seen(context).model_config(request.name, request.version, _asker(context))

    async def _model_statistics(self, request: Any, context: Context) -> Any:
        return await self._seen(context).model_statistics(request.name, request.version, _asker(context))

    async def _repository_index(self, request: Any, context: Context) -> Any:
        return await self._seen(context).repository_index(request, _asker(context))

    def _seen(self, context: Context) -> Catalogue:
        return self.catalogue.seen_by(access_of(context))

    def _controlled(self, method: str) -> Callable[[Any, Context], Awaitable[Any]]:
        async def call(request: Any, context: Context) -> Any:
            metadata = tuple(context.invocation_metadata() or ())
            remaining = context.time_remaining()
            access = access_of(context)
            return await self.control.call(
                method, request, metadata=metadata, peer=context.peer(), remaining=remaining, access=access
            )

        return call


def _asker(context: Context) -> Asker:
    seconds = context.time_remaining()
    return Asker(passed_on(context.invocation_metadata() or ()), TIMEOUT if seconds is None else seconds)


def _typed(handler: Callable[[Any, Context], Awaitable[Any]], request: type[Any]) -> grpc.RpcMethodHandler:
    """A handler of protobuf messages (Any: their classes carry no types)."""
    return grpc.unary_unary_rpc_method_handler(
        with_errors(handler),
        request_deserializer=request.FromString,
        response_serializer=lambda answer: answer.SerializeToString(),
    )
