"""V2 calls as bytes, so that a test sees exactly what a server answers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import serialize_byte_tensor

SERVICE = "/inference.GRPCInferenceService/"
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
Metadata = Sequence[tuple[str, str | bytes]]


def public_name(dtype: str) -> str:
    """The public model over `identity_<dtype>`."""
    return f"same-{dtype.lower()}"


@dataclass(frozen=True)
class Outcome:
    """How one unary call ended. A failed one has no body."""

    code: grpc.StatusCode
    text: str
    body: bytes = b""
    initial: tuple[tuple[str, Any], ...] = ()
    trailing: tuple[tuple[str, Any], ...] = ()

    @property
    def response(self) -> Any:
        return pb.ModelInferResponse.FromString(self.body)

    @property
    def trailers(self) -> dict[str, Any]:
        return dict(self.trailing)


@contextlib.asynccontextmanager
async def channel_to(address: str) -> AsyncIterator[grpc.aio.Channel]:
    """A connection of its own."""
    async with grpc.aio.insecure_channel(address, [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield channel


@contextlib.asynccontextmanager
async def channels_to(address: str, count: int) -> AsyncIterator[list[grpc.aio.Channel]]:
    """So many, each on a connection of its own."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(channel_to(address)) for _ in range(count)]


def batch_of(outcome: Outcome) -> int:
    """With how many requests this one has left as one."""
    return int(outcome.trailers.get("gateway-batch", 1))


async def call(
    channel: grpc.aio.Channel,
    request: Any,
    method: str = "ModelInfer",
    *,
    metadata: Metadata = (),
    timeout: float | None = 60,
    compression: grpc.Compression | None = None,
) -> Outcome:
    """Call one V2 method. request: a message, or its bytes."""
    body = request if isinstance(request, bytes) else request.SerializeToString()
    made = channel.unary_unary(SERVICE + method)(body, metadata=metadata, timeout=timeout, compression=compression)
    try:
        answer = await made
    except grpc.aio.AioRpcError as error:
        initial, trailing = tuple(error.initial_metadata() or ()), tuple(error.trailing_metadata() or ())
        return Outcome(error.code(), error.details() or "", b"", initial, trailing)
    initial, trailing = tuple(await made.initial_metadata()), tuple(await made.trailing_metadata())
    return Outcome(grpc.StatusCode.OK, "", answer, initial, trailing)


def stream(channel: grpc.aio.Channel, metadata: Metadata = (), timeout: float | None = 60) -> Any:
    """Begin a ModelStreamInfer of typed messages."""
    method = channel.stream_stream(
        SERVICE + "ModelStreamInfer",
        request_serializer=pb.ModelInferRequest.SerializeToString,
        response_deserializer=pb.ModelStreamInferResponse.FromString,
    )
    return method(metadata=metadata, timeout=timeout)


async def read_all(streaming: Any) -> list[Any]:
    """Every answer up to an OK end."""
    answers = []
    while (answer := await streaming.read()) is not grpc.aio.EOF:
        answers.append(answer)
    assert await streaming.code() is grpc.StatusCode.OK, await streaming.details()
    return answers


async def stream_all(channel: grpc.aio.Channel, requests: Iterable[Any], metadata: Metadata = ()) -> list[Any]:
    """Send all requests, say that they are all, and read every answer."""
    streaming = stream(channel, metadata)
    for request in requests:
        await streaming.write(request)
    await streaming.done_writing()
    return await read_all(streaming)


def infer(
    model: str,
    values: Any = ((1.0, 2.0),),
    datatype: str = "FP32",
    *,
    id: str = "",
    version: str = "",
    parameters: dict[str, bool | int | float | str] | None = None,
    name: str = "IN",
) -> Any:
    """A ModelInferRequest with one raw input."""
    request = pb.ModelInferRequest(model_name=model, id=id, model_version=version)
    array = np.asarray(values, np.object_ if datatype == "BYTES" else DTYPES[datatype])
    request.inputs.add(name=name, datatype=datatype, shape=array.shape)
    raw = serialize_byte_tensor(array).item() if datatype == "BYTES" else array.tobytes()
    request.raw_input_contents.append(raw)
    set_parameters(request, parameters or {})
    return request


DTYPES = {"FP32": np.float32, "INT32": np.int32, "BOOL": np.bool_}


def set_parameters(request: Any, parameters: dict[str, Any]) -> None:
    for key, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
        setattr(request.parameters[key], kind, value)


def numbers(response: Any) -> list[float]:
    """The FP32 or INT32 values of a response's only output."""
    (output,), (raw,) = response.outputs, response.raw_output_contents
    return list(np.frombuffer(raw, DTYPES[output.datatype]).tolist())
