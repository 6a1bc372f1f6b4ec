"""Gateways in this process, what they know of their endpoints, and endpoints that follow a script."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from v2_calls import channel_to

from gateway.app import Gateway, Place
from gateway.config import Loaded, transparent
from gateway.upstream.endpoint import Endpoint

FLAGS = {"--listen": "127.0.0.1:0", "--admin-listen": "127.0.0.1:0"}


def gateway_of(loaded: Loaded) -> Gateway:
    return Gateway(loaded, lambda: loaded, {}, Place(loaded.config.admin.listen))


def transparent_to(address: str) -> Gateway:
    """As `serve --triton` makes it."""
    return gateway_of(transparent(address, {}, FLAGS))


def endpoint_of(gateway: Gateway, upstream: str) -> Endpoint:
    """An upstream's first endpoint."""
    return gateway._topology.now.pools[upstream].endpoints[0]


Infer = Callable[[bytes, Any], Awaitable[bytes]]
Stream = Callable[[AsyncIterator[bytes], Any], Awaitable[None]]


async def no_infer(body: bytes, context: Any) -> bytes:
    return bytes(pb.ModelInferResponse(model_name="scripted", model_version="1").SerializeToString())


async def no_stream(requests: AsyncIterator[bytes], context: Any) -> None:
    async for _ in requests:
        return


@dataclass
class Script:
    """An endpoint on a real grpcio server that is always live and ready, and does the rest as told."""

    infer: Infer = no_infer
    stream: Stream = no_stream
    others: dict[str, Infer] = field(default_factory=dict)  # unary methods by name
    metadata: list[dict[str, Any]] = field(default_factory=list)  # of each ModelInfer and ModelStreamInfer

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Serve it; gives the address."""
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((self._handlers(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(0)

    def _handlers(self) -> Any:
        async def live(body: bytes, context: Any) -> bytes:
            return bytes(pb.ServerLiveResponse(live=True).SerializeToString())

        async def ready(body: bytes, context: Any) -> bytes:
            return bytes(pb.ModelReadyResponse(ready=True).SerializeToString())

        async def infer(body: bytes, context: Any) -> bytes:
            self.metadata.append(dict(context.invocation_metadata()))
            return await self.infer(body, context)

        async def stream(requests: AsyncIterator[bytes], context: Any) -> None:
            self.metadata.append(dict(context.invocation_metadata()))
            await self.stream(requests, context)

        methods = {"ServerLive": live, "ModelReady": ready, "ModelInfer": infer, **self.others}
        handlers = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()}
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(stream)
        return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)


@contextlib.asynccontextmanager
async def in_front_of(script: Script) -> AsyncIterator[grpc.aio.Channel]:
    """A connection to a transparent gateway before it."""
    async with (
        script.serve() as address,
        transparent_to(address) as gateway,
        channel_to(gateway.listen) as channel,
    ):
        yield channel
