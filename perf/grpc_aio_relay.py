"""A relay that forwards every unary call and ModelStreamInfer as bytes, on Google's asyncio library: the usual Python.

`python -m perf.grpc_aio_relay PORT TRITON_PORT`. It does not route, count or fall back: what it costs is the library's.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop

_NO_LIMIT = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


class Relay(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, triton: grpc.aio.Channel) -> None:
        self._triton = triton

    def service(self, details: Any) -> grpc.RpcMethodHandler:
        if details.method == _STREAM:
            return grpc.stream_stream_rpc_method_handler(self._stream)
        method = self._triton.unary_unary(details.method)

        async def unary(body: bytes, context: Any) -> bytes:
            try:
                return await method(body, timeout=context.time_remaining())
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details())

        return grpc.unary_unary_rpc_method_handler(unary)

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for answer in self._triton.stream_stream(_STREAM)(requests):
            yield answer


async def serve(port: int, triton: int) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{triton}", options=_NO_LIMIT) as channel:
        server = grpc.aio.server(options=_NO_LIMIT)
        server.add_generic_rpc_handlers((Relay(channel),))
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.install()
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2])))
