"""Multicallables and calls as `grpc.aio`'s: awaited, iterated, read and written."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc
import grpc.aio

from gateway.status import Code, Origin
from gateway.types import Metadata
from gateway.wire.client import ClientCall
from gateway.wire.fields import Fields, fields_from, metadata_from
from gateway.wire.messages import compress

if TYPE_CHECKING:
    from gateway.forward.channel import WireChannel

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}
_ENCODINGS = {grpc.Compression.Gzip: b"gzip", grpc.Compression.Deflate: b"deflate"}

Serializer = Callable[[Any], bytes] | None
Deserializer = Callable[[bytes], Any] | None


class CallError(grpc.aio.AioRpcError):  # type: ignore[misc]  # grpcio has no types
    """A call ended with another status than OK; `origin` says at whose hands."""

    origin = Origin.SERVER


class Call:
    """What calls of all four kinds share; see `grpc.aio.Call`. Messages are what the (de)serializers say: `Any`."""

    def __init__(
        self,
        channel: WireChannel,
        wire: ClientCall,
        serializer: Serializer,
        deserializer: Deserializer,
        encoding: bytes,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._limits = channel.options.limits
        self._wire = wire
        self._serializer = serializer
        self._deserializer = deserializer
        self._encoding = encoding
        self._head: asyncio.Future[None] = loop.create_future()
        self._end: asyncio.Future[None] = loop.create_future()
        self._callbacks: list[Callable[[Any], None]] = []
        wire.request_encoding = encoding
        wire.on_head = self._head_arrived
        wire.on_done = self._ended

    def _head_arrived(self, wire: ClientCall) -> None:
        _resolve(self._head)

    def _ended(self, wire: ClientCall) -> None:
        _resolve(self._head)
        _resolve(self._end)
        for callback in self._callbacks:
            callback(self)

    # As grpc.aio's

    def cancel(self) -> bool:
        if self._wire.done:
            return False
        self._wire.cancel()
        return True

    def cancelled(self) -> bool:
        return self._wire.done and self._wire.code is Code.CANCELLED

    def done(self) -> bool:
        return self._wire.done

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        if self._wire.done:
            callback(self)
        else:
            self._callbacks.append(callback)

    def time_remaining(self) -> float | None:
        deadline = self._wire.deadline
        return None if deadline is None else max(0.0, deadline - self._loop.time())

    async def wait_for_connection(self) -> None:
        await asyncio.shield(self._head)

    async def initial_metadata(self) -> Any:  # grpc.aio.Metadata, whose types are not checked
        await asyncio.shield(self._head)
        return _metadata(self._wire.initial)

    async def trailing_metadata(self) -> Any:
        await asyncio.shield(self._end)
        return _metadata(self._wire.trailing)

    async def code(self) -> grpc.StatusCode:
        await asyncio.shield(self._end)
        return _STATUS_CODES[int(self._wire.code)]

    async def details(self) -> str:
        await asyncio.shield(self._end)
        return self._wire.text

    def debug_error_string(self) -> str:
        """As C core's, in the one thing that can be told from it: did the status come from the server?"""
        return "Error received from peer" if self._wire.from_server else ""

    # For the kinds

    def _error(self) -> Exception:
        wire = self._wire
        error = CallError(
            _STATUS_CODES[int(wire.code)],
            _metadata(wire.initial),
            _metadata(wire.trailing),
            wire.text,
            self.debug_error_string(),
        )
        error.origin = wire.origin
        return error

    def _raise_if_failed(self) -> None:
        wire = self._wire
        if wire.code is Code.CANCELLED and wire.origin is Origin.GIVEN_UP:
            raise asyncio.CancelledError
        if self._wire.code is not Code.OK:
            raise self._error()

    def _encode(self, message: Any) -> bytes:
        body = message if self._serializer is None else self._serializer(message)
        return compress(body, self._encoding) if self._encoding else body

    def _decode(self, body: bytes) -> Any:
        try:
            return body if self._deserializer is None else self._deserializer(body)
        except Exception:
            self._wire.code, self._wire.text = Code.INTERNAL, "The response message can't be parsed"
            self._wire.origin = Origin.ANSWER
        raise self._error()


class _OneAnswer(Call):
    """A call that is awaited."""

    def __await__(self) -> Generator[Any, None, Any]:
        return self._answer().__await__()

    async def _answer(self) -> Any:
        try:
            await asyncio.shield(self._end)
        except asyncio.CancelledError:
            self.cancel()
            raise
        self._raise_if_failed()
        return self._decode(self._wire.body)


class _ManyAnswers(Call):
    """A call that is read or iterated."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._messages: deque[bytes] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._wire.on_message = self._message_arrived

    def _message_arrived(self, body: bytes, compressed: bool) -> None:
        self._messages.append(body)
        if self._reader is not None:
            _resolve(self._reader)

    def _ended(self, wire: ClientCall) -> None:
        super()._ended(wire)
        if self._reader is not None:
            _resolve(self._reader)

    async def read(self) -> Any:
        """The next answer, or `grpc.aio.EOF` after a call that went well."""
        while not self._messages:
            if self._wire.done:
                self._raise_if_failed()
                return grpc.aio.EOF
            if self._wire.id:
                self._wire.feed()
            self._reader = self._loop.create_future()
            try:
                await self._reader
            except asyncio.CancelledError:
                self.cancel()
                raise
        return self._decode(self._messages.popleft())

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message


class _ManyRequests(Call):
    """A call that is written to, by hand or from an iterator."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._wire.on_started = self._on_started
        self._feeding: asyncio.Task[None] | None = None

    def _on_started(self, wire: ClientCall) -> None:
        _resolve(self._started)

    def _ended(self, wire: ClientCall) -> None:
        _resolve(self._started)
        super()._ended(wire)
        if self._feeding is not None:
            self._feeding.cancel()

    async def write(self, message: Any) -> None:
        """Send one request, once the server has room for it."""
        await asyncio.shield(self._started)
        wire = self._wire
        if wire.done:
            self._raise_if_failed()
            raise asyncio.InvalidStateError("The call has ended")
        wire.send_message(self._encode(message), bool(self._encoding))
        if wire.unsent > self._limits.unsent_bytes:
            room: asyncio.Future[None] = self._loop.create_future()
            wire.when_writable(lambda: _resolve(room))
            await room

    async def done_writing(self) -> None:
        await asyncio.shield(self._started)
        self._wire.half_close()

    def _feed(self, requests: AsyncIterable[Any] | Iterable[Any]) -> None:
        self._feeding = self._loop.create_task(self._write_all(requests))

    async def _write_all(self, requests: AsyncIterable[Any] | Iterable[Any]) -> None:
        try:
            if isinstance(requests, AsyncIterable):
                async for message in requests:
                    await self.write(message)
            else:
                for message in requests:
                    await self.write(message)
            await self.done_writing()
        except grpc.aio.AioRpcError:
            return  # the call's end says it
        except Exception as error:
            self._wire.cancel(Code.UNKNOWN, f"The request iterator raised {type(error).__name__}")


class UnaryUnaryCall(_OneAnswer):
    """See `grpc.aio.UnaryUnaryCall`."""


class UnaryStreamCall(_ManyAnswers):
    """See `grpc.aio.UnaryStreamCall`."""


class StreamUnaryCall(_ManyRequests, _OneAnswer):
    """See `grpc.aio.StreamUnaryCall`."""


class StreamStreamCall(_ManyRequests, _ManyAnswers):
    """See `grpc.aio.StreamStreamCall`."""


AnyCall = TypeVar("AnyCall", bound=Call)
AnyManyRequests = TypeVar("AnyManyRequests", bound=_ManyRequests)


class _Multicallable(Generic[AnyCall]):
    def __init__(
        self,
        kind: type[AnyCall],
        channel: WireChannel,
        method: str,
        serializer: Serializer,
        deserializer: Deserializer,
    ) -> None:
        self._kind = kind
        self._channel = channel
        self._path = method.encode()
        self._serializer = serializer
        self._deserializer = deserializer

    def _call(self, timeout: float | None, metadata: Metadata | None, compression: grpc.Compression | None) -> AnyCall:
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        wire = self._channel.call(self._path, fields_from(metadata), deadline)
        encoding = _ENCODINGS.get(compression, b"") if compression is not None else b""
        return self._kind(self._channel, wire, self._serializer, self._deserializer, encoding)

    def _submit(self, call: Call, wait_for_ready: bool | None) -> None:
        self._channel.submit(call._wire, wait_for_ready=bool(wait_for_ready))


class OneRequest(_Multicallable[AnyCall]):
    """See `grpc.aio.UnaryUnaryMultiCallable` and `UnaryStreamMultiCallable`."""

    def __call__(
        self,
        request: Any,
        *,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        credentials: object = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> AnyCall:
        call = self._call(timeout, metadata, compression)
        call._wire.request = call._encode(request)
        self._submit(call, wait_for_ready)
        return call


class ManyRequests(_Multicallable[AnyManyRequests]):
    """See `grpc.aio.StreamUnaryMultiCallable` and `StreamStreamMultiCallable`."""

    def __call__(  # noqa: PLR0917  # grpc.aio's own signature
        self,
        request_iterator: AsyncIterable[Any] | Iterable[Any] | None = None,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        credentials: object = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> AnyManyRequests:
        call = self._call(timeout, metadata, compression)
        self._submit(call, wait_for_ready)
        if request_iterator is not None:
            call._feed(request_iterator)
        return call


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _metadata(fields: Fields) -> Any:
    return grpc.aio.Metadata(*metadata_from(fields))
