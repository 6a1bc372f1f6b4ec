"""A Triton that is played by C-core's server, for faults that a real one can't be told to have at a given moment.

Its ledger has each request's id once for each time that it was executed. As a program it serves on the port that it is
given until it is killed, or crashes of a request whose id begins with `crash`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb

SERVICE = "inference.GRPCInferenceService"
ANSWER = b"\0\0\0\0"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]

Behaviour = Callable[[Any, grpc.aio.ServicerContext], Awaitable[None]]
"""What a request meets before it is answered."""


async def answers(request: Any, context: grpc.aio.ServicerContext) -> None:
    """Like a small model."""
    await asyncio.sleep(0.005)


async def fails_at_once(request: Any, context: grpc.aio.ServicerContext) -> None:
    await context.abort(grpc.StatusCode.INTERNAL, "CUDA error: an illegal memory access was encountered")


async def hangs(request: Any, context: grpc.aio.ServicerContext) -> None:
    await asyncio.sleep(3600)


class PlayedTriton:
    """Lives, and every model is ready; how it infers can be changed at any time."""

    def __init__(self, behaviour: Behaviour = answers) -> None:
        self.behaviour = behaviour
        self.executed: Counter[str] = Counter()
        self.address = ""

    async def infer(self, body: bytes, context: Any) -> bytes:
        request = pb.ModelInferRequest.FromString(body)
        self.executed[request.id] += 1
        if request.id.startswith("crash"):
            os._exit(9)
        await self.behaviour(request, context)
        return _answer_to(request).SerializeToString()

    async def stream(self, bodies: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for body in bodies:
            request = pb.ModelInferRequest.FromString(body)
            self.executed[request.id] += 1
            if request.id.startswith("crash"):
                os._exit(9)
            await self.behaviour(request, context)
            answer = _answer_to(request)
            answer.parameters["triton_final_response"].bool_param = True
            yield pb.ModelStreamInferResponse(infer_response=answer).SerializeToString()

    def handlers(self) -> grpc.GenericRpcHandler:
        async def live(body: bytes, context: Any) -> bytes:
            return bytes(pb.ServerLiveResponse(live=True).SerializeToString())

        async def ready(body: bytes, context: Any) -> bytes:
            return bytes(pb.ModelReadyResponse(ready=True).SerializeToString())

        async def metadata(body: bytes, context: Any) -> bytes:
            answer = pb.ModelMetadataResponse(name=pb.ModelMetadataRequest.FromString(body).name)
            answer.inputs.add(name="IN", datatype="UINT8", shape=[-1, 4])
            return bytes(answer.SerializeToString())

        unary = grpc.unary_unary_rpc_method_handler
        methods = {"ServerLive": unary(live), "ModelReady": unary(ready), "ModelInfer": unary(self.infer)}
        methods["ModelMetadata"] = unary(metadata)
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self.stream)
        return grpc.method_handlers_generic_handler(SERVICE, methods)


def _answer_to(request: Any) -> Any:
    answer = pb.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
    answer.outputs.add(name="OUT", datatype="INT32", shape=[1])
    answer.raw_output_contents.append(ANSWER)
    return answer


@contextlib.asynccontextmanager
async def played(behaviour: Behaviour = answers, address: str = "127.0.0.1:0") -> AsyncIterator[PlayedTriton]:
    async with playing(PlayedTriton(behaviour), address) as triton:
        yield triton


@contextlib.asynccontextmanager
async def playing(triton: PlayedTriton, address: str = "127.0.0.1:0") -> AsyncIterator[PlayedTriton]:
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((triton.handlers(),))
    port = server.add_insecure_port(address)
    triton.address = f"127.0.0.1:{port}"
    await server.start()
    try:
        yield triton
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def processes(count: int) -> AsyncIterator[list[tuple[asyncio.subprocess.Process, str]]]:
    """So many of them, each a process of its own, with their addresses."""
    async with contextlib.AsyncExitStack() as exits:
        started = []
        for _ in range(count):
            process = await asyncio.create_subprocess_exec(sys.executable, __file__, stdout=asyncio.subprocess.PIPE)
            exits.push_async_callback(_end, process)
            started.append(process)
        found = []
        for process in started:
            assert process.stdout is not None
            found.append((process, (await process.stdout.readline()).decode().strip()))
        yield found


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def _serve() -> None:
    async with played() as triton:
        print(triton.address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve())
