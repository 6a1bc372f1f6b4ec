"""A Triton that keeps a book: `scripted_triton.py ADDRESS BOOK [MILLISECONDS]`.

It answers probes, and ModelInfer and ModelStreamInfer with bytes that only this request's id has (`answer_to`), after
MILLISECONDS. It appends each id to BOOK as it executes it, before it answers, so that what was executed is known after
SIGKILL too.

Only then it reads the tensor, which is the id again and again (`tensor_of`), from the message or from memory that it
shares; if that is another one by then, BOOK gets an id that nobody has. As with Triton, a call that is
cancelled is computed to its end, and memory that is in use stays.
"""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc


def answer_to(id_: str) -> bytes:
    return hashlib.sha256(id_.encode()).digest()


def tensor_of(id_: str, size: int) -> bytes:
    """size: bytes, a multiple of 32."""
    return id_.encode().ljust(32) * (size // 32)


class ScriptedTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, book: str, seconds: float) -> None:
        self._book = os.open(book, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._seconds = seconds
        self._regions: dict[str, mmap.mmap] = {}
        self._in_use: Counter[str] = Counter()
        self._working: set[asyncio.Task[Any]] = set()

    async def ServerLive(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return pb.ServerReadyResponse(ready=True)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        return pb.ModelReadyResponse(ready=True)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        return pb.ServerMetadataResponse(name="triton", version="2.51.0")

    async def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        file = os.open(f"/dev/shm{request.key}", os.O_RDONLY)
        self._regions[request.name] = mmap.mmap(file, request.byte_size, prot=mmap.PROT_READ)
        os.close(file)
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryStatus(self, request: Any, context: Any) -> Any:
        if request.name and request.name not in self._regions:
            await context.abort(grpc.StatusCode.NOT_FOUND, "Unable to find system shared memory region")
        names = [request.name] if request.name else list(self._regions)
        return pb.SystemSharedMemoryStatusResponse(regions={name: {"name": name} for name in names})

    async def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        if self._in_use[request.name]:
            await context.abort(grpc.StatusCode.INTERNAL, "Cannot unregister shared memory region, it is in use")
        self._regions.pop(request.name, None)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def _execute(self, asked: Any, context: Any) -> Any:
        where = asked.inputs[0].parameters
        name = where["shared_memory_region"].string_param if "shared_memory_region" in where else ""
        if name and name not in self._regions:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"Unable to find shared memory region: '{name}'")
        os.write(self._book, f"{asked.id}\n".encode())
        working = asyncio.ensure_future(self._compute(asked, name))
        self._working.add(working)
        working.add_done_callback(self._working.discard)
        await asyncio.shield(working)
        answer = pb.ModelInferResponse(model_name=asked.model_name, model_version="1", id=asked.id)
        answer.outputs.add(name="OUT", datatype="UINT8", shape=[32])
        answer.raw_output_contents.append(answer_to(asked.id))
        return answer

    async def _compute(self, asked: Any, name: str) -> None:
        region, where = self._regions.get(name), asked.inputs[0].parameters
        self._in_use[name] += 1
        await self.work()
        self._in_use[name] -= 1
        if region is None:
            (tensor,) = asked.raw_input_contents
        else:
            begin = where["shared_memory_offset"].int64_param
            tensor = region[begin : begin + where["shared_memory_byte_size"].int64_param]
        if tensor != tensor_of(asked.id, asked.inputs[0].shape[0]):
            os.write(self._book, f"another-than-{asked.id}\n".encode())

    async def work(self) -> None:
        """What a model does."""
        await asyncio.sleep(self._seconds)

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        return await self._execute(request, context)

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for asked in requests:
            answer = await self._execute(asked, context)
            answer.parameters["triton_final_response"].bool_param = True  # as Triton's every answer on a stream says
            yield pb.ModelStreamInferResponse(infer_response=answer)


async def main(address: str, book: str, milliseconds: str = "0") -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
        ScriptedTriton(book, float(milliseconds) / 1000), server
    )
    server.add_insecure_port(address)
    await server.start()
    print("serving", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
