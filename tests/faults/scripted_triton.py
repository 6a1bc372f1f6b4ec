"""A Triton that keeps a book: `scripted_triton.py ADDRESS BOOK [MILLISECONDS]`.

It answers probes, and ModelInfer and ModelStreamInfer with bytes that only this request's id has (`answer_to`), after
MILLISECONDS. It appends each id to BOOK as it executes it, before it answers, so that what was executed is known after
SIGKILL too.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc


def answer_to(id_: str) -> bytes:
    return hashlib.sha256(id_.encode()).digest()


class ScriptedTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, book: str, seconds: float) -> None:
        self._book = os.open(book, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._seconds = seconds

    async def ServerLive(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return pb.ServerReadyResponse(ready=True)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        return pb.ModelReadyResponse(ready=True)

    async def _execute(self, asked: Any) -> Any:
        os.write(self._book, f"{asked.id}\n".encode())
        await asyncio.sleep(self._seconds)
        answer = pb.ModelInferResponse(model_name=asked.model_name, model_version="1", id=asked.id)
        answer.outputs.add(name="OUT", datatype="UINT8", shape=[32])
        answer.raw_output_contents.append(answer_to(asked.id))
        return answer

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        return await self._execute(request)

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for asked in requests:
            answer = await self._execute(asked)
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
