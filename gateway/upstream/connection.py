"""What the rest of the gateway may do with one endpoint: Protocols and the values that cross them.

Bodies are serialized messages. A transport (`grpcio`, later others) implements `Connection`; it alone knows sockets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from gateway.types import Metadata


@dataclass(frozen=True, slots=True)
class Answer:
    """One unary answer."""

    body: bytes
    initial: Metadata
    trailing: Metadata


class CallFailed(Exception):
    """A call to an endpoint ended with another status than OK.

    from_server is False if the transport made the status itself: no connection, reset, GOAWAY.
    """

    def __init__(self, code: int, text: str, trailing: Metadata = (), *, from_server: bool = True) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text
        self.trailing = trailing
        self.from_server = from_server


class StreamCall(Protocol):
    """A bidirectional call that has begun."""

    async def write(self, body: bytes) -> None:
        """Send one message; waits while the peer takes nothing. raises: CallFailed once the call is over."""
        ...

    async def done_writing(self) -> None: ...

    async def read(self) -> bytes | None:
        """The next message, or None at an OK end. raises: CallFailed at any other end."""
        ...

    def cancel(self) -> None: ...


class Connection(Protocol):
    """The way to one endpoint. It connects by itself, again and again."""

    async def unary(self, path: str, body: bytes, metadata: Metadata, timeout: float | None) -> Answer:
        """Call `path` (`/package.Service/Method`). timeout: seconds. raises: CallFailed."""
        ...

    def stream(self, path: str, metadata: Metadata, timeout: float | None) -> StreamCall: ...

    async def aclose(self) -> None: ...
