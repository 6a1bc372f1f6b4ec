"""I/O: a `Connection` on an asyncio gRPC channel: grpcio's, or `forward`'s, which behaves as grpcio's does."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc

from gateway.forward.channel import UPSTREAM, ChannelOptions, WireChannel, client_tls
from gateway.status import Code
from gateway.types import Metadata
from gateway.upstream.connection import Answer, CallFailed


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files for a TLS channel. `certificate` and `key` are the gateway's own, for mutual TLS."""

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    server_name: str | None = None


def grpcio_channel(address: str, max_message_bytes: int, tls: Tls | None) -> grpc.aio.Channel:
    """raises: OSError if a file of `tls` can't be read."""
    options: list[tuple[str, Any]] = [
        # Only what comes in is limited: a request at the limit may grow by the model's own name.
        ("grpc.max_send_message_length", -1),
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
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    ca, key, certificate = (Path(f).read_bytes() if f else None for f in (tls.ca, tls.key, tls.certificate))
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    return grpc.aio.secure_channel(address, credentials, options=options)


def wire_channel(address: str, max_message_bytes: int, tls: Tls | None) -> WireChannel:
    """raises: OSError, ssl.SSLError if a file of `tls` can't be used."""
    # No keepalive pings, as above; the probes ask every second and notice a connection that hangs.
    limits = replace(UPSTREAM, message_bytes=max_message_bytes, keepalive_seconds=0.0)
    context = client_tls(tls.ca, tls.certificate, tls.key) if tls else None
    server_name = tls.server_name if tls else None
    return WireChannel(address, ChannelOptions(limits=limits, tls=context, server_name=server_name))


class ChannelConnection:
    """One channel to one address (`host:port`)."""

    def __init__(self, channel: grpc.aio.Channel | WireChannel) -> None:
        self.channel = channel
        self._unary: dict[str, Any] = {}

    async def unary(self, path: str, body: bytes, metadata: Metadata, timeout: float | None) -> Answer:
        method = self._unary.get(path)
        if method is None:
            # Paths are the fixed set of V2 methods, so this does not grow.
            method = self._unary[path] = self.channel.unary_unary(path)
        try:
            call = method(body, metadata=tuple(metadata), timeout=timeout)
            answer = await call
            return Answer(
                answer, tuple(await call.initial_metadata() or ()), tuple(await call.trailing_metadata() or ())
            )
        except grpc.aio.AioRpcError as error:
            raise translate(error) from error
        except grpc.aio.UsageError as error:  # it was closed, because the config no longer has this endpoint
            raise CallFailed(Code.UNAVAILABLE, "the connection is closed", from_server=False) from error

    def stream(self, path: str, metadata: Metadata, timeout: float | None) -> ChannelStream:
        return ChannelStream(self.channel.stream_stream(path)(metadata=tuple(metadata), timeout=timeout))

    async def aclose(self) -> None:
        await self.channel.close(None)


class ChannelStream:
    """A bidirectional call."""

    def __init__(self, call: Any) -> None:
        self._call = call  # grpc.aio.StreamStreamCall or its like, whose message types are open

    async def write(self, body: bytes) -> None:
        try:
            await self._call.write(body)
        except grpc.aio.AioRpcError as error:
            raise translate(error) from error
        except (grpc.aio.UsageError, asyncio.InvalidStateError) as error:  # the call ended between two writes
            raise CallFailed(Code.UNAVAILABLE, "the stream has ended", from_server=False) from error

    async def done_writing(self) -> None:
        try:
            await self._call.done_writing()
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            return  # it is over: `read` says how

    async def read(self) -> bytes | None:
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise translate(error) from error
        return None if message is grpc.aio.EOF else bytes(message)

    def cancel(self) -> None:
        self._call.cancel()


def translate(error: grpc.aio.AioRpcError) -> CallFailed:
    return CallFailed(
        error.code().value[0],
        error.details() or "",
        tuple(error.trailing_metadata() or ()),
        from_server=is_from_server(error.debug_error_string()),
    )


_FROM_PEER = "Error received from peer"
_MADE_HERE = re.compile(
    r"failed to connect to all addresses|errors resolving|DNS resolution failed|empty address list"
    r"|Stream removed|Socket closed|Connection reset|Broken pipe|[Tt]ransport closed|GOAWAY|RST_STREAM"
    r"|Endpoint closing|[Cc]hannel (is )?clos|ping timeout|keepalive watchdog|CLIENT: "
)


def is_from_server(debug: str | None) -> bool:
    """Did the peer send this status? debug: what the channel tells of a failed call besides code and text.

    C core up to 1.81 says of a received status, and of none of its own, that it came from the peer. Later ones say
    only the text, so what C core itself writes is known by its words. `forward` says it as the older ones do.
    """
    if not debug or _FROM_PEER in debug:
        return bool(debug)
    return not _MADE_HERE.search(debug)
