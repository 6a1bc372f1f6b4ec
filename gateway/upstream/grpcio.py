"""I/O: a `Connection` on grpcio's asyncio channel. The only module here that imports grpc."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from gateway.types import Metadata
from gateway.upstream.connection import Answer, CallFailed

Dial = Callable[[str], "GrpcioConnection"]


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM bytes for a TLS channel. `certificate` and `key` are the gateway's own, for mutual TLS."""

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None
    server_name: str | None = None


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # Retrying is decided in `infer`, which knows variants; grpcio's own would hide attempts from telemetry.
        ("grpc.enable_retries", 0),
        # Triton's default is to answer GOAWAY to more than one ping per 5 minutes without data.
        ("grpc.keepalive_time_ms", 2**31 - 1),
        # A restarted server is found again within a second.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # Channels with equal arguments share one connection in one process; pools count on their own.
        ("grpc.use_local_subchannel_pool", 1),
    ]


class GrpcioConnection:
    """One channel to one address (`host:port`)."""

    def __init__(self, address: str, *, max_message_bytes: int, tls: Tls | None = None) -> None:
        options: list[tuple[str, Any]] = [*channel_options(max_message_bytes)]
        if tls is None:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            if tls.server_name:
                options.append(("grpc.ssl_target_name_override", tls.server_name))
            credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
            self._channel = grpc.aio.secure_channel(address, credentials, options=options)
        self._unary: dict[str, Any] = {}

    async def unary(self, path: str, body: bytes, metadata: Metadata, timeout: float | None) -> Answer:
        method = self._unary.get(path)
        if method is None:
            # Paths are the fixed set of V2 methods, so this does not grow.
            method = self._unary[path] = self._channel.unary_unary(path)
        call = method(body, metadata=tuple(metadata), timeout=timeout)
        try:
            answer = await call
            return Answer(
                answer, tuple(await call.initial_metadata() or ()), tuple(await call.trailing_metadata() or ())
            )
        except grpc.aio.AioRpcError as error:
            raise translate(error) from error

    def stream(self, path: str, metadata: Metadata, timeout: float | None) -> GrpcioStream:
        return GrpcioStream(self._channel.stream_stream(path)(metadata=tuple(metadata), timeout=timeout))

    async def aclose(self) -> None:
        await self._channel.close()


class GrpcioStream:
    """A bidirectional call of grpcio."""

    def __init__(self, call: Any) -> None:
        self._call = call  # grpc.aio.StreamStreamCall; its stubs leave the message types open

    async def write(self, body: bytes) -> None:
        try:
            await self._call.write(body)
        except grpc.aio.AioRpcError as error:
            raise translate(error) from error
        except grpc.aio.UsageError as error:  # the call ended between two writes
            raise await self._ended() from error

    async def done_writing(self) -> None:
        try:
            await self._call.done_writing()
        except (grpc.aio.AioRpcError, grpc.aio.UsageError):
            return  # it is over: `read` says how

    async def read(self) -> bytes | None:
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise translate(error) from error
        if message is not grpc.aio.EOF:
            return bytes(message)
        failure = await self._ended()
        if failure.code:
            raise failure
        return None

    def cancel(self) -> None:
        self._call.cancel()

    async def _ended(self) -> CallFailed:
        code = await self._call.code()
        return CallFailed(
            code.value[0],
            await self._call.details() or "",
            tuple(await self._call.trailing_metadata() or ()),
            from_server=is_from_server(self._call.debug_error_string()),
        )


def translate(error: grpc.aio.AioRpcError) -> CallFailed:
    return CallFailed(
        error.code().value[0],
        error.details() or "",
        tuple(error.trailing_metadata() or ()),
        from_server=is_from_server(error.debug_error_string()),
    )


def is_from_server(debug: str | None) -> bool:
    """C core says of a received status, and of none that it made itself, that it came from the peer."""
    return "Error received from peer" in (debug or "")
