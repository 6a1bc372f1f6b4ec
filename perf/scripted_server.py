"""A server with Triton's protocol that can be made to fail: `python -m perf.scripted_server PORT MILLISECONDS [QUEUE]`.

It answers ModelInfer with the request's id and eight numbers after MILLISECONDS, and says in `server` which one it is.
With QUEUE it executes one call at a time, has so many wait, and refuses the others in Triton's words. SIGUSR1: every
call fails at once. SIGUSR2: no call is answered. SIGHUP: it is well again. All the while it is live and its model is
ready, as a Triton with a broken CUDA context is. SIGTERM: it ends as Triton does, what it has is answered, and new
calls and connections are not taken.
"""

from __future__ import annotations

import asyncio
import signal
import struct
import sys
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

_WELL, _FAILS, _HANGS = "well", "fails", "hangs"
_GRACE = 5.0  # seconds
_NUMBERS = struct.pack("<8f", *range(8))
_SERVING = b"\x08\x01"  # a HealthCheckResponse


class Health(grpc.GenericRpcHandler):  # type: ignore[misc]
    """`grpc.health.v1`, which Triton has too, and Envoy asks."""

    def service(self, details: Any) -> grpc.RpcMethodHandler | None:
        if details.method != "/grpc.health.v1.Health/Check":
            return None

        async def check(_body: bytes, _context: Any) -> bytes:
            return _SERVING

        return grpc.unary_unary_rpc_method_handler(check)


class Scripted(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, name: str, seconds: float, queue: int) -> None:
        self.mode = _WELL
        self._name = name
        self._seconds = seconds
        self._queue = queue
        self._taken = 0  # executed or waiting
        self._one = asyncio.Lock()

    async def ServerLive(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return pb.ServerReadyResponse(ready=True)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        return pb.ModelReadyResponse(ready=True)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        told = pb.ModelMetadataResponse(name=request.name, versions=["1"])
        told.outputs.add(name="OUT", datatype="FP32", shape=[-1, 8])
        return told

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        if self.mode == _FAILS:
            await context.abort(grpc.StatusCode.INTERNAL, "CUDA error: an illegal memory access was encountered")
        if self.mode == _HANGS:
            await asyncio.sleep(3600)
        if self._queue:
            await self._in_turn(request, context)
        else:
            await asyncio.sleep(self._seconds)
        answer = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
        answer.parameters["server"].string_param = self._name
        answer.outputs.add(name="OUT", datatype="FP32", shape=[1, 8])
        answer.raw_output_contents.append(_NUMBERS)
        return answer

    async def _in_turn(self, request: Any, context: Any) -> None:
        if self._taken > self._queue:
            text = f"[request id: {request.id}] Exceeds maximum queue size"
            await context.abort(grpc.StatusCode.UNAVAILABLE, text)
        self._taken += 1
        try:
            async with self._one:
                await asyncio.sleep(self._seconds)
        finally:
            self._taken -= 1


async def main(port: str, milliseconds: str, queue: str = "0") -> None:
    scripted = Scripted(port, float(milliseconds) / 1000, int(queue))
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(scripted, server)
    server.add_generic_rpc_handlers((Health(),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, over.set)
    for number, mode in ((signal.SIGUSR1, _FAILS), (signal.SIGUSR2, _HANGS), (signal.SIGHUP, _WELL)):
        loop.add_signal_handler(number, setattr, scripted, "mode", mode)
    await server.start()
    await over.wait()
    await server.stop(_GRACE)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
