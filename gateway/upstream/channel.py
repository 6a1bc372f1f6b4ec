"""I/O: a `Connection` on one of `transport`'s channels."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from gateway.http2.limits import UPSTREAM
from gateway.rpc.budget import Budget
from gateway.rpc.client import ClientCall
from gateway.rpc.framing import PREFIX
from gateway.rpc.metadata import fields_from, metadata_from
from gateway.status import OK, Code
from gateway.transport.dialer import ChannelOptions, WireChannel, client_tls
from gateway.types import Metadata
from gateway.upstream.connection import Answer, CallFailed, StreamCall, StreamListener

MOST_DISCARDED: Final = 100
"""Unary calls that were given up and that a Triton may finish all the same, at once on a connection: told of many that
ended early, it may crash."""


MOST_WITH_TWO: Final = 100
"""Endpoints of a pool that get two connections each. In a larger one a single endpoint's reconnecting is no loss, and
what connections cost a Triton is what ends the growth of a fleet."""


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files for a TLS channel. `certificate` and `key` are the gateway's own, for mutual TLS."""

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    server_name: str | None = None


def wire_channel(
    address: str, max_message_bytes: int, tls: Tls | None, budget: Budget | None = None, *, pool: int = 1
) -> ChannelConnection:
    """budget: for answers that are collected whole. pool: how many endpoints the upstream has.

    raises: OSError, ssl.SSLError if a file of `tls` can't be used.
    """
    limits = replace(UPSTREAM, message_bytes=max_message_bytes)
    context = client_tls(tls.ca, tls.certificate, tls.key) if tls else None
    server_name = tls.server_name if tls else None
    options = ChannelOptions(
        connections=1 if pool > MOST_WITH_TWO else 2,
        limits=limits,
        tls=context,
        server_name=server_name,
        most_discarded=MOST_DISCARDED,
        budget=budget,
    )
    return ChannelConnection(address, options)


class ChannelConnection(WireChannel):
    """One channel to one address (`host:port`), as a `Connection`."""

    async def unary(self, path: str, body: bytes, metadata: Metadata, timeout: float | None) -> Answer:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        deadline = None if timeout is None else loop.time() + timeout
        call = self.call(path.encode(), fields_from(metadata), deadline)
        call.request = body
        call.on_done = lambda _: None if ended.done() else ended.set_result(None)
        self.submit(call)
        try:
            await ended
        except asyncio.CancelledError:
            call.on_done = None
            call.cancel()
            raise
        if call.code is not OK:
            raise _failure_of(call)
        return Answer(call.body, metadata_from(call.initial), metadata_from(call.trailing))

    def stream(self, path: str, metadata: Metadata, timeout: float | None, listener: StreamListener) -> StreamCall:
        return WireStream(self, path, metadata, timeout, listener)

    def tell_faults(self, told: Callable[[str], None]) -> None:
        self.on_fault = told

    async def aclose(self) -> None:
        await self.close(None)


def _failure_of(call: ClientCall) -> CallFailed:
    return CallFailed(call.code, call.text, metadata_from(call.trailing), origin=call.origin)


class WireStream:
    """A bidirectional call."""

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
        self._listener.ended(_failure_of(wire))
