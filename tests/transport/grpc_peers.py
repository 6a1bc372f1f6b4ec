"""A small service that both transports serve, and ways to run it: the same objects, the same cases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from gateway.http2.limits import Limits
from gateway.transport.listener import ForwardMethod, WireServer

SERVICE = "test.Service"
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Service:
    """Bytes in, bytes out; what a request says is what happens."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.running = 0

    async def unary(self, request: bytes, context: Any) -> bytes:
        match request.split(b" ")[0]:
            case b"abort":
                await context.abort(grpc.StatusCode.NOT_FOUND, "100 % näh", (("k", "v"), ("k-bin", b"\0\xff")))
            case b"raise":
                raise ValueError("secret")
            case b"code":
                context.set_code(grpc.StatusCode.DATA_LOSS)
                context.set_details("set by hand")
            case b"sleep":
                self.running += 1
                self.started.set()
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    self.cancelled.set()
                    raise
                finally:
                    self.running -= 1
            case b"metadata":
                await context.send_initial_metadata((("initial", "1"), ("initial-bin", b"\1")))
                context.set_trailing_metadata((("trailing", "2"), ("trailing", "3"), ("trailing-bin", b"\2")))
                return repr(sorted((k, v) for k, v in context.invocation_metadata() if k.startswith("x-"))).encode()
            case b"time":
                left = context.time_remaining()
                return b"none" if left is None else b"%.1f" % left
            case b"gzip":
                context.set_compression(grpc.Compression.Gzip)
        return request

    async def server_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for number in range(int(request)):
            yield b"%d" % number

    async def client_stream(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        size = 0
        async for request in requests:
            size += len(request)
        return b"%d" % size

    async def both(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            if request == b"abort":
                await context.abort(grpc.StatusCode.ABORTED, "as asked")
            yield request

    async def by_hand(self, _: Any, context: Any) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(request.upper())


def handlers(service: Service) -> dict[str, grpc.RpcMethodHandler]:
    return {
        "Unary": grpc.unary_unary_rpc_method_handler(service.unary),
        "ServerStream": grpc.unary_stream_rpc_method_handler(service.server_stream),
        "ClientStream": grpc.stream_unary_rpc_method_handler(service.client_stream),
        "Both": grpc.stream_stream_rpc_method_handler(service.both),
        "ByHand": grpc.stream_stream_rpc_method_handler(service.by_hand),
    }


def path(method: str) -> str:
    return f"/{SERVICE}/{method}"


@asynccontextmanager
async def wire_server(
    service: Service | None = None,
    forward: dict[str, ForwardMethod] | None = None,
    limits: Limits | None = None,
    port: int = 0,
) -> AsyncIterator[tuple[WireServer, str]]:
    server = WireServer(forward, limits)
    if service is not None:
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers(service)),))
        server.add_registered_method_handlers(SERVICE, handlers(service))
    port = server.listen(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await server.stop()


@asynccontextmanager
async def grpcio_server(service: Service, port: int = 0) -> AsyncIterator[tuple[grpc.aio.Server, str]]:
    server = grpc.aio.server(options=[*UNLIMITED, ("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers(service)),))
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
