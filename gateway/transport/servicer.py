"""Handlers of grpcio's generated code: one task per call, with a context like that of `grpc.aio`."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple, NoReturn, Protocol

import grpc
import grpc.aio

from gateway.http2.limits import Limits
from gateway.rpc.codes import CallFailed
from gateway.rpc.framing import compress
from gateway.rpc.metadata import Fields, fields_from, metadata_from
from gateway.rpc.server import ServerCall
from gateway.status import Code
from gateway.types import Metadata, MetadataValue

log = logging.getLogger("gateway.transport")

# QUEUED messages of a call wait for its handler, or QUEUED_BYTES; the rest stays bytes whose window is not returned.
QUEUED: Final = 16
QUEUED_BYTES: Final = 65_536

UNEXPECTED_TEXT = "Unexpected error in the service"  # the log has the details

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}
_ENCODINGS = {grpc.Compression.Gzip: b"gzip", grpc.Compression.Deflate: b"deflate"}


class Metadatum(NamedTuple):
    """A pair of metadata. Handlers may use its names, as with grpc.aio."""

    key: str
    value: MetadataValue


class MethodHandler(Protocol):
    """Like grpc.RpcMethodHandler; the kind of call decides which field is set. Any: messages and contexts of any
    type."""

    request_streaming: bool
    response_streaming: bool
    request_deserializer: Callable[[bytes], Any] | None
    response_serializer: Callable[[Any], bytes] | None
    unary_unary: Callable[[Any, Any], Any] | None
    unary_stream: Callable[[Any, Any], Any] | None
    stream_unary: Callable[[Any, Any], Any] | None
    stream_stream: Callable[[Any, Any], Any] | None


class Servicing:
    """Holds the tasks of running calls."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self, call: ServerCall, handler: MethodHandler) -> None:
        """Take a call whose request headers have arrived."""
        context = Context(call, handler, self._limits)
        if handler.request_streaming:
            call.streaming = True
            call.on_message = context._message_arrived
            call.on_request = context._half_closed
            self._start(context)
        else:
            call.on_request = lambda _: self._start(context)

    def _start(self, context: Context) -> None:
        task = asyncio.get_running_loop().create_task(context._serve())
        context._task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Cancel all tasks, and wait for them."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


class Context(grpc.aio.ServicerContext[Any, Any]):  # type: ignore[misc]  # grpc's types are not checked
    """A handler's view of its call; see `grpc.aio.ServicerContext`.

    Two things differ: texts of unexpected exceptions stay in the log, and `auth_context` and peer identities are empty.
    """

    def __init__(self, call: ServerCall, handler: MethodHandler, limits: Limits) -> None:
        self._call = call
        self._handler = handler
        self._limits = limits
        self._task: asyncio.Task[None] | None = None
        self._messages: deque[bytes] = deque()
        self._queued_bytes = 0  # bytes in `_messages`
        self._no_more = False
        self._reader: asyncio.Future[None] | None = None
        self._code = Code.OK
        self._details = ""
        self._trailing: list[tuple[str, MetadataValue]] = []
        self._head_sent = False
        self._encoding = b""
        self._compress_next = True
        self._cancelled = False
        self._done = False
        self._callbacks: list[Callable[[Any], None]] = []
        call.on_cancel = self._ended_by_client

    # Called by the call

    def _message_arrived(self, body: bytes, compressed: bool) -> None:
        self._messages.append(body)
        self._queued_bytes += len(body)
        self._call.hungry = len(self._messages) < QUEUED and self._queued_bytes < QUEUED_BYTES
        self._wake_reader()

    def _half_closed(self, call: ServerCall) -> None:
        self._no_more = True
        self._wake_reader()

    def _wake_reader(self) -> None:
        if self._reader is not None:
            _resolve(self._reader)

    def _ended_by_client(self, code: Code) -> None:
        self._cancelled = code is Code.CANCELLED
        self._code = code
        if self._task is not None and not self._task.done():
            connection = self._call.server
            connection.hold()
            self._task.add_done_callback(lambda _: connection.release())
            self._task.cancel()

    # The handler's task

    async def _serve(self) -> None:
        try:
            await self._handle()
        except grpc.aio.AbortError:
            pass
        except CallFailed as failure:
            self._finish(failure.code, failure.text)
        except asyncio.CancelledError:
            self._finish(Code.CANCELLED, "The call was cancelled")
        except Exception:
            log.exception("the handler of %s failed", self._call.head.path.decode("latin-1"))
            if self._code is Code.OK:
                self._code, self._details = Code.UNKNOWN, UNEXPECTED_TEXT
            self._finish(self._code, self._details)
        finally:
            self._done = True
            for callback in self._callbacks:
                callback(self)

    async def _handle(self) -> None:
        handler = self._handler
        if handler.request_streaming:
            behaviour = handler.stream_stream if handler.response_streaming else handler.stream_unary
            request: Any = self._requests()
        else:
            behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary
            request = self._decode(self._call.body)
            self._call.body = b""
        if behaviour is None:
            raise CallFailed(Code.UNIMPLEMENTED, "Method not found!")
        answer = behaviour(request, self)
        if inspect.isasyncgen(answer) or hasattr(answer, "__aiter__"):
            async for message in answer:
                await self.write(message)
            self._finish(self._code, self._details)
            return
        if inspect.isawaitable(answer):
            answer = await answer
        if handler.response_streaming:  # the handler has sent its answers by `write`
            self._finish(self._code, self._details)
        else:
            self._answer(answer)

    def _answer(self, message: Any) -> None:
        if self._code is not Code.OK:
            self._finish(self._code, self._details)
        elif self._head_sent or self._encoding or self._details:
            self._send(self._encode(message))
            self._finish(self._code, self._details)
        else:
            self._call.reply(self._encode(message), (), self._trailing_fields())

    def _finish(self, code: Code, text: str) -> None:
        self._call.finish(code, text, self._trailing_fields())

    def _trailing_fields(self) -> Fields:
        return fields_from(self._trailing) if self._trailing else ()

    # Messages

    def _decode(self, body: bytes) -> Any:
        deserialize = self._handler.request_deserializer
        if deserialize is None:
            return body
        try:
            return deserialize(body)
        except Exception as error:
            raise CallFailed(Code.INTERNAL, "The request message can't be parsed") from error

    def _encode(self, message: Any) -> bytes:
        serialize = self._handler.response_serializer
        return message if serialize is None else serialize(message)

    async def _requests(self) -> AsyncIterator[Any]:
        while True:
            message = await self.read()
            if message is grpc.aio.EOF:
                return
            yield message

    async def read(self) -> Any:
        """The next request, or `grpc.aio.EOF`."""
        messages, call = self._messages, self._call
        while not messages:
            if self._no_more or call.done:
                return grpc.aio.EOF
            call.feed()
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        body = messages.popleft()
        self._queued_bytes -= len(body)
        if not call.hungry and len(messages) < QUEUED // 2 and self._queued_bytes < QUEUED_BYTES:
            call.feed()  # more may arrive while the handler works on this one
        return self._decode(body)

    async def write(self, message: Any) -> None:
        """Send one answer, once the client has room for it."""
        if self._call.done:
            raise asyncio.InvalidStateError("The call has ended")
        self._send(self._encode(message))
        if self._call.unsent > self._limits.unsent_bytes:
            room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._call.when_writable(lambda: _resolve(room))
            await room

    def _send(self, body: bytes) -> None:
        self._send_head(())
        compressed = bool(self._encoding) and self._compress_next
        self._compress_next = True
        self._call.send_message(compress(body, self._encoding) if compressed else body, compressed)

    def _send_head(self, initial: Fields) -> None:
        if not self._head_sent:
            self._head_sent = True
            self._call.send_headers(initial, self._encoding)

    # What handlers read and set

    async def send_initial_metadata(self, initial_metadata: Metadata) -> None:
        if self._head_sent:
            raise asyncio.InvalidStateError("Initial metadata was already sent")
        self._send_head(fields_from(initial_metadata))

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        if self._done or self._call.done:
            raise asyncio.InvalidStateError("The call has ended")
        if code is grpc.StatusCode.OK:
            raise ValueError("A call can't be aborted with OK")
        self._code, self._details = Code(code.value[0]), details
        if trailing_metadata:
            self._trailing = list(trailing_metadata)
        self._finish(self._code, details)
        raise grpc.aio.AbortError("Locally aborted.")

    async def abort_with_status(self, status: Any) -> NoReturn:  # Any: grpc.Status is an interface without types
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        self._trailing = list(trailing_metadata)

    @property
    def access(self) -> Any:  # Any: what it is, is not this room's affair
        """`RequestHead.access`; grpc.aio has nothing like it."""
        return self._call.head.access

    def invocation_metadata(self) -> Any:  # Any: a sequence of pairs; grpc's own type is wider
        return tuple(Metadatum(key, value) for key, value in metadata_from(self._call.head.fields))

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = Code(code.value[0])

    def set_details(self, details: str) -> None:
        self._details = details

    def set_compression(self, compression: grpc.Compression) -> None:
        if self._head_sent:
            raise asyncio.InvalidStateError("Compression must be set before initial metadata is sent")
        encoding = _ENCODINGS.get(compression, b"")
        self._encoding = encoding if encoding in self._call.head.accepts.replace(b" ", b"").split(b",") else b""

    def disable_next_message_compression(self) -> None:
        self._compress_next = False

    def peer(self) -> str:
        return self._call.peer

    def peer_identities(self) -> Iterable[bytes] | None:
        return None

    def peer_identity_key(self) -> str | None:
        return None

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        return {}

    def time_remaining(self) -> Any:  # Any: a float, or None without a deadline; grpc's annotation forgets None
        if self._call.deadline is None:
            return None
        return max(0.0, self._call.deadline - asyncio.get_running_loop().time())

    def trailing_metadata(self) -> Any:
        return tuple(self._trailing)

    def code(self) -> grpc.StatusCode:
        return _STATUS_CODES[int(self._code)]

    def details(self) -> str:
        return self._details

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def cancelled(self) -> bool:
        return self._cancelled

    def done(self) -> bool:
        return self._done or self._call.done


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
