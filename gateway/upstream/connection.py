"""What the rest of the gateway may do with one endpoint: Protocols and the values that cross them.

Bodies are serialized messages. `channel` implements `Connection`; it alone knows sockets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gateway.rpc.client import ClientCall
from gateway.rpc.metadata import Fields
from gateway.status import Origin
from gateway.types import Metadata


@dataclass(frozen=True, slots=True)
class Answer:
    """One unary answer."""

    body: bytes
    initial: Metadata
    trailing: Metadata


class CallFailed(Exception):
    """A call to an endpoint ended with another status than OK."""

    def __init__(self, code: int, text: str, trailing: Metadata = (), *, origin: Origin = Origin.SERVER) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text
        self.trailing = trailing
        self.origin = origin

    @property
    def from_server(self) -> bool:
        """Did the endpoint give the status itself?"""
        return self.origin is Origin.SERVER


class StreamListener(Protocol):
    """Whoever began a bidirectional call: told what comes of it until it has ended or is cancelled."""

    def message_arrived(self, body: bytes) -> bool:
        """The next message. False: let none follow until `StreamCall.feed`; those on their way may all the same."""
        ...

    def has_room(self) -> None:
        """More can be sent, after `StreamCall.send` said that it could not."""
        ...

    def ended(self, failure: CallFailed | None) -> None:
        """None at an OK end. Never called from within a method of the call."""
        ...


class StreamCall(Protocol):
    """A bidirectional call that has begun. No method waits."""

    def send(self, body: bytes) -> bool:
        """Send one message; it is lost once the call is over. False: the peer takes nothing, wait for `has_room`."""
        ...

    def done_writing(self) -> None: ...

    def feed(self) -> None:
        """The next message is wanted, after `message_arrived` said that it was not."""
        ...

    def cancel(self) -> None: ...


class Connection(Protocol):
    """The way to one endpoint. It connects by itself, again and again."""

    def call(self, path: bytes, fields: Fields, deadline: float | None) -> ClientCall:
        """A unary call to fill in and `submit`. deadline: on the event loop's clock, that of `time.monotonic()`."""
        ...

    def submit(self, call: ClientCall) -> None:
        """Put it on the wire, now or as soon as it can be. Its `on_done` never comes before this returns."""
        ...

    async def unary(self, path: str, body: bytes, metadata: Metadata, timeout: float | None) -> Answer:
        """Call `path` (`/package.Service/Method`). timeout: seconds. raises: CallFailed."""
        ...

    def stream(self, path: str, metadata: Metadata, timeout: float | None, listener: StreamListener) -> StreamCall: ...

    def tell_faults(self, told: Callable[[str], None]) -> None:
        """Have `told` hear why, whenever the server has broken a rule or a limit and was cut for it."""
        ...

    @property
    def losses(self) -> int:
        """Times that a connection has ended: the server may have been started again since the last one."""
        ...

    async def aclose(self) -> None: ...
