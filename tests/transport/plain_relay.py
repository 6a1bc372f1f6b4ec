"""A relay without routing: bytes from a `WireServer` to a `WireChannel` and back, whole or cut through."""

from __future__ import annotations

from collections.abc import Callable

from gateway.http2.hpack import Field, NeverIndexed
from gateway.rpc.client import ClientCall
from gateway.rpc.metadata import is_metadata
from gateway.rpc.places import pipe
from gateway.rpc.server import ServerCall
from gateway.status import Code
from gateway.transport.dialer import WireChannel
from gateway.transport.listener import ForwardMethod


def never_indexed(fields: object) -> list[Field]:
    return [NeverIndexed(name, value) for name, value in fields if is_metadata(name)]  # type: ignore[attr-defined]


def relay(pick: Callable[[], WireChannel]) -> ForwardMethod:
    """Forward unary calls to the channel that `pick` answers."""

    def handle(call: ServerCall) -> None:
        channel = pick()
        up = channel.call(call.head.path, never_indexed(call.head.fields), call.deadline)
        up.request = call.body
        up.request_more = call.missing
        up.request_encoding = call.encoding if call.compressed else b""
        if call.missing:
            pipe(call, up)
        up.on_front = lambda _: front(call, up)
        up.on_done = lambda _: done(call, up)
        call.on_cancel = lambda code: up.cancel()
        call.on_request = lambda _: up.half_close()  # of a message that was cut through
        channel.submit(up)

    def front(call: ServerCall, up: ClientCall) -> None:
        call.send_headers(never_indexed(up.initial), up.encoding if up.compressed else b"")
        call.send_front(up.body, up.missing, up.compressed)
        pipe(up, call)

    def done(call: ServerCall, up: ClientCall) -> None:
        if up.code is not Code.OK:
            call.fail(up.code, up.text, never_indexed(up.trailing))
        elif up.on_chunk is not None:
            call.finish(Code.OK, "", never_indexed(up.trailing))
        else:
            encoding = up.encoding if up.compressed else b""
            call.reply(up.body, never_indexed(up.initial), never_indexed(up.trailing), encoding)

    return ForwardMethod(handle, cut_through=True)
