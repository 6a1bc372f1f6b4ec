"""Gateways with callers, over an upstream that counts what reaches it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from played_triton import ANSWER
from tritonclient.grpc import service_pb2 as pb

from gateway.access.api_keys import hash_of
from gateway.app import Gateway, Place
from gateway.config import Loaded, load

MARK = ("x-mark", "1")
"""What every call of the tests has in its metadata."""

SERVICE = "inference.GRPCInferenceService"
KEYS = {name: f"igk_{name}-{'0' * 40}" for name in ("user", "admin", "other")}

CONFIG = """
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
{server}
upstreams: {{main: {{endpoints: ["{address}"], probe_interval: 1s}}}}
direct: {{models: all}}
models:
  adder: {{variants: {{only: {{upstream: main, model: add_one}}}}}}
  secret: {{variants: {{only: {{upstream: main, model: hidden_one}}}}}}
  caption:
    pipeline:
      inputs: [{{name: IN, datatype: UINT8, shape: [4]}}]
      outputs: [{{name: OUT, datatype: INT32, shape: [1]}}]
      steps: [{{call: secret}}]
"""

ACCESS = f"""
access:
  api_keys:
{"".join(f'    - {{caller: {name}, sha256: "{hash_of(key).hex()}"}}{chr(10)}' for name, key in KEYS.items())}
  groups: {{operators: [admin]}}
  grants:
    - {{callers: [user], models: [adder, caption]}}
    - {{callers: [other], models: [secret], rpcs: [inference]}}
    - groups: [operators]
      models: ["*"]
      direct: ["*"]
      rpcs: [inference, metadata, details, control, Reflection]
      allow: [all]
"""


class CountingTriton:
    """An upstream that answers everything and remembers callers' calls, which are marked, with their metadata."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.metadata: list[dict[str, Any]] = []
        self.address = ""

    def _noted(self, name: str, context: Any) -> None:
        metadata = dict(context.invocation_metadata())
        if MARK[0] in metadata:
            self.calls[name] += 1
            self.metadata.append(metadata)

    def handlers(self) -> grpc.GenericRpcHandler:
        methods = {}
        for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
            if method.name == "ModelStreamInfer":
                methods[method.name] = grpc.stream_stream_rpc_method_handler(self._stream)
            else:
                methods[method.name] = grpc.unary_unary_rpc_method_handler(self._unary(method.name))
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _unary(self, name: str) -> Any:
        async def answer(body: bytes, context: Any) -> bytes:
            if name == "ServerLive":
                return bytes(pb.ServerLiveResponse(live=True).SerializeToString())
            if name == "ModelReady":
                return bytes(pb.ModelReadyResponse(ready=True).SerializeToString())
            if name == "RepositoryIndex":
                names = ("add_one", "hidden_one", "third")
                models = [pb.RepositoryIndexResponse.ModelIndex(name=n, version="1", state="READY") for n in names]
                self._noted(name, context)
                return bytes(pb.RepositoryIndexResponse(models=models).SerializeToString())
            if name == "ModelMetadata":
                asked = pb.ModelMetadataRequest.FromString(body)
                self._noted(name, context)
                answer = pb.ModelMetadataResponse(name=asked.name)
                answer.inputs.add(name="IN", datatype="UINT8", shape=[4])
                answer.outputs.add(name="OUT", datatype="INT32", shape=[1, 1])
                return bytes(answer.SerializeToString())
            self._noted(name, context)
            if name == "ModelInfer":
                return bytes(_answer_to(pb.ModelInferRequest.FromString(body)).SerializeToString())
            return b""

        return answer

    async def _stream(self, bodies: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for body in bodies:
            self._noted("ModelStreamInfer", context)
            answer = _answer_to(pb.ModelInferRequest.FromString(body))
            answer.parameters["triton_final_response"].bool_param = True
            yield pb.ModelStreamInferResponse(infer_response=answer).SerializeToString()


def _answer_to(request: Any) -> Any:
    answer = pb.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
    answer.outputs.add(name="OUT", datatype="INT32", shape=[1, 1])
    answer.raw_output_contents.append(ANSWER)
    return answer


@contextlib.asynccontextmanager
async def counting() -> AsyncIterator[CountingTriton]:
    triton = CountingTriton()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((triton.handlers(),))
    triton.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield triton
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def closed_gateway(
    folder: Path,
    triton: CountingTriton,
    access: str = ACCESS,
    server: str = "server: {control: all}\ntelemetry: {access_log: {destination: none}}",
) -> AsyncIterator[Gateway]:
    """A gateway that reads its config again, from `folder`, when told by `reload`."""
    file = folder / "gateway.yaml"
    file.write_text(CONFIG.format(address=triton.address, server=server) + access)

    def read() -> Loaded:
        return load(file, {})

    loaded = read()
    async with Gateway(loaded, read, {}, Place(loaded.config.admin.listen)) as gateway:
        yield gateway


def request(model: str, id: str = "", **parameters: Any) -> Any:
    message = pb.ModelInferRequest(model_name=model, id=id, raw_input_contents=[b"\0\1\2\3"])
    message.inputs.add(name="IN", datatype="UINT8", shape=[1, 4])
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
        setattr(message.parameters[name], kind, value)
    return message


def key_of(name: str) -> tuple[tuple[str, str], ...]:
    return (MARK, ("x-api-key", KEYS[name])) if name in KEYS else (MARK,)
