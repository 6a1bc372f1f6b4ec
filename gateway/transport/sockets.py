"""Sockets: to listen on an address, for both IP versions; and to connect to a host that has several addresses."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Any, Final

NEXT_ADDRESS_SECONDS: Final = 0.25  # until the next address is tried too (RFC 8305 section 5)
EVERY_ADDRESS: Final = "::"
_NO_IPV6: Final = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)

Address = tuple[int, Any]
"""A family, and an address in the form that its sockets take."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet. host: a name, an IP, or "" for every IPv4 address.

    "::" takes IPv4 too, as gRPC's own servers do. On a machine without IPv6 it takes IPv4 alone.

    :raises OSError: if the address can't be bound.
    """
    if ":" not in host:
        return _bind(socket.AF_INET, (host, port))
    try:
        return _bind(socket.AF_INET6, (host, port))
    except OSError as error:
        if host != EVERY_ADDRESS or error.errno not in _NO_IPV6:
            raise
        return _bind(socket.AF_INET, ("", port))


def _bind(family: int, place: tuple[str, int]) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind(place)
    except BaseException:
        bound.close()
        raise
    return bound


async def connect(host: str, port: int) -> socket.socket:
    """A socket connected to the first address of the host that answers (RFC 8305, "happy eyeballs").

    :raises OSError: if no address answers; the system's timeout applies.
    """
    left = deque(in_turns(await _resolve(host, port)))
    trying: set[asyncio.Task[socket.socket]] = set()
    failure: BaseException = OSError(f"{host} has no address")
    try:
        while left or trying:
            if left:
                trying.add(asyncio.ensure_future(_connect(*left.popleft())))
            wait = NEXT_ADDRESS_SECONDS if left else None
            done, trying = await asyncio.wait(trying, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if error is None:
                    trying |= done - {task}  # several attempts may have succeeded at once
                    return task.result()
                failure = error
    finally:
        for task in trying:
            task.add_done_callback(_close)
            task.cancel()
    raise failure


async def _resolve(host: str, port: int) -> list[Address]:
    try:  # an IP address needs no thread
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(int(family), place) for family, _, _, _, place in found]


def in_turns(addresses: Iterable[Address]) -> Sequence[Address]:
    """Addresses with families in turns, the first one's first; the order within a family stays (RFC 8305 section 4)."""
    families: dict[int, list[Address]] = {}
    for address in addresses:
        families.setdefault(address[0], []).append(address)
    return [address for row in zip_longest(*families.values()) for address in row if address is not None]


async def _connect(family: int, place: Any) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        await asyncio.get_running_loop().sock_connect(made, place)
    except BaseException:
        made.close()
        raise
    return made


def _close(task: asyncio.Task[socket.socket]) -> None:
    """Close the socket of an attempt that succeeded too late."""
    with suppress(asyncio.CancelledError, OSError):
        task.result().close()


def peer_name(address: object) -> str:
    """A peer's address in grpc's form. address: as `getpeername` gives it."""
    if not isinstance(address, tuple):
        return "unix:"
    host, port = address[0].removeprefix("::ffff:"), address[1]  # grpc shows IPv4 on a dual-stack socket as IPv4
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
