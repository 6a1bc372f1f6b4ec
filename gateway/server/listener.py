"""What the listening sides have in common, whichever transport they are on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

Register = Callable[[Any], None]
"""Adds a service's handlers to a server, as generated `add_…_to_server` functions do."""


class CannotServe(Exception):
    """The gRPC address can't be listened on; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class ServerTls:
    """PEM files. With `client_ca` clients must show a certificate of that authority."""

    certificate: str
    key: str
    client_ca: str | None = None


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where and how to listen."""

    listen: str  # HOST:PORT, port 0 for a free one
    max_message_bytes: int
    share_port: bool = False  # with other workers, by SO_REUSEPORT
    tls: ServerTls | None = None
    max_streams: int = 100  # calls at once on one connection
    max_connections: int = 10_000
    max_connection_age: float | None = None  # seconds, ± 10 %
    refused: Callable[[str], None] = lambda why: None  # hears of each connection that could not stay, and why


class Listener(Protocol):
    """A server of either transport."""

    port: int  # the one it has got, after `start`

    async def start(self) -> None:
        """:raises CannotServe: if the address is taken or not ours, or the TLS files can't be used."""

    def renew_certificate(self) -> None:
        """Read the TLS files again, if there are any, for connections that begin from now on.

        :raises OSError: if they can't be used; then those before stay in use.
        """

    async def stop(self, grace: float) -> None:
        """Take no more calls, give those in flight `grace` seconds, then cancel them."""
