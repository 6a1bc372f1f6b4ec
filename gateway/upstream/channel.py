"""I/O: a `Connection` on an asyncio gRPC channel: grpcio's, or `forward`'s, which behaves as grpcio's does."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import grpc

from gateway.forward.channel import UPSTREAM, ChannelOptions, WireChannel, client_tls
from gateway.status import Code
from gateway.types import Metadata
from gateway.upstream.connection import Answer, CallFailed, StreamCall, StreamListener
from gateway.wire.budget import Budget
from gateway.wire.client import ClientCall
from gateway.wire.fields import fields_from, legible_metadata
from gateway.wire.messages import PREFIX

# Of one stream's messages that grpcio has not taken; beyond it their sender is told to wait.
_QUEUE_BYTES: Final = 65_536


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


def wire_channel(address: str, max_message_bytes: int, tls: Tls | None, budget: Budget | None = None) -> WireChannel:
    """budget: for answers that are collected whole. raises: OSError, ssl.SSLError if a file of `tls` can't be used."""
    # No keepalive pings, as above; the probes ask every second and notice a connection that hangs.
    limits = replace(UPSTREAM, message_bytes=max_message_bytes, keepalive_seconds=0.0)
    context = client_tls(tls.ca, tls.certificate, tls.key) if tls else None
    server_name = tls.server_name if tls else None
    return WireChannel(address, ChannelOptions(limits=limits, tls=context, server_name=server_name, budget=budget))


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

    def stream(self, path: str, metadata: Metadata, timeout: float | None, listener: StreamListener) -> StreamCall:
        if isinstance(self.channel, WireChannel):
            return WireStream(self.channel, path, metadata, timeout, listener)
        return GrpcioStream(self.channel.stream_stream(path)(metadata=tuple(metadata), timeout=timeout), listener)

    async def aclose(self) -> None:
        await self.channel.close(None)


class WireStream:
    """A bidirectional call on the `wire` transport."""

    __slots__ = ("_early", "_is_all", "_limit", "_listener", "_unsent", "_wire")

    def __init__(
        self, channel: WireChannel, path: str, metadata: Metadata, timeout: float | None, listener: StreamListener
    ) -> None:
        self._listener = listener
        self._limit = channel.options.limits.unsent_bytes
        self._unsent = 0  # bytes that may be waiting; a bound, so that asking is rare
        self._early: list[bytes] = []  # messages that wait for a connection
        self._is_all = False
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        wire = self._wire = channel.call(path.encode(), fields_from(metadata), deadline)
        wire.on_message = self._message_arrived
        wire.on_started = self._started
        wire.on_done = self._ended
        channel.submit(wire)

    def send(self, body: bytes) -> bool:
        wire = self._wire
        if not wire.id:
            self._early.append(body)
            return False
        wire.send_message(body)
        self._unsent += len(body) + PREFIX
        if self._unsent <= self._limit:
            return True
        self._unsent = wire.unsent
        if self._unsent <= self._limit:
            return True
        wire.when_writable(self._listener.has_room)
        return False

    def done_writing(self) -> None:
        self._is_all = True
        self._wire.half_close()

    def feed(self) -> None:
        self._wire.feed()

    def cancel(self) -> None:
        self._wire.on_done = self._wire.on_message = self._wire.on_started = None
        self._wire.cancel()

    def _started(self, wire: ClientCall) -> None:
        wire.on_unprocessed = None  # what was sent is not kept here: whoever has the messages tries again
        early, self._early = self._early, []
        for body in early:
            wire.send_message(body)
        if self._is_all:
            wire.half_close()
        if early:
            self._listener.has_room()

    def _message_arrived(self, body: bytes, compressed: bool) -> None:
        self._wire.hungry = self._listener.message_arrived(body)

    def _ended(self, wire: ClientCall) -> None:
        if wire.code is Code.OK:
            self._listener.ended(None)
            return
        trailing = legible_metadata(wire.trailing)
        self._listener.ended(CallFailed(wire.code, wire.text, trailing, from_server=wire.from_server))


class GrpcioStream:
    """A bidirectional call on grpcio, by one task that reads and one that writes."""

    def __init__(self, call: Any, listener: StreamListener) -> None:
        self._call = call  # grpc.aio.StreamStreamCall, whose message types are open
        self._listener = listener
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._is_all = False
        self._is_full = False
        self._is_cancelled = False
        self._has_work = asyncio.Event()
        self._is_fed = asyncio.Event()
        self._tasks = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._write())]

    def send(self, body: bytes) -> bool:
        self._queue.append(body)
        self._queued_bytes += len(body)
        self._is_full = self._queued_bytes > _QUEUE_BYTES
        self._has_work.set()
        return not self._is_full

    def done_writing(self) -> None:
        self._is_all = True
        self._has_work.set()

    def feed(self) -> None:
        self._is_fed.set()

    def cancel(self) -> None:
        self._is_cancelled = True
        for task in self._tasks:
            task.cancel()
        self._call.cancel()

    async def _write(self) -> None:
        try:
            while True:
                while self._queue:
                    body = self._queue.popleft()
                    await self._call.write(body)
                    self._queued_bytes -= len(body)
                    if self._is_full and self._queued_bytes <= _QUEUE_BYTES:
                        self._is_full = False
                        self._listener.has_room()
                if self._is_all:
                    await self._call.done_writing()
                    return
                self._has_work.clear()
                await self._has_work.wait()
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            return  # it is over: who reads it sees how

    async def _read(self) -> None:
        failure: CallFailed | None = None
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self._is_fed.clear()
                if not self._listener.message_arrived(message):
                    await self._is_fed.wait()
        except grpc.aio.AioRpcError as error:
            failure = translate(error)
        except asyncio.CancelledError:
            if self._is_cancelled:
                raise
            failure = CallFailed(Code.UNAVAILABLE, "the connection is closed", from_server=False)
        self._tasks[1].cancel()
        self._listener.ended(failure)


def translate(error: grpc.aio.AioRpcError) -> CallFailed:
    return CallFailed(
        error.code().value[0],
        error.details() or "",
        tuple(error.trailing_metadata() or ()),
        from_server=is_from_server(error.debug_error_string()),
    )


_FROM_PEER: Final = "Error received from peer"
_MADE_HERE: Final = re.compile(
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
