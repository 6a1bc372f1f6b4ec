"""I/O: the addresses behind names. Looks up `dns:///NAME:PORT` again and again and tells when an answer has changed.

A headless Service of Kubernetes answers with one address per pod; a plain `NAME:PORT` would be one connection to one of
them. What is found becomes endpoints of the fleet like any other, so calls are balanced one by one and pods that come
and go are followed. Knows names and addresses only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import threading
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence

_log = logging.getLogger(__name__)

_PERIOD_SECONDS = 5.0  # Envoy's default for the same; Kubernetes' DNS answers are cached for 5 to 30 s anyway
_FIRST_RETRY_SECONDS = 1.0  # until a name has been found for the first time

Name = tuple[str, int]
"""A host name and the port that every address of it is asked on."""

Resolve = Callable[[str], Awaitable[Collection[str]]]
"""Host name → its addresses. raises: OSError if there is no answer."""


class Discovery:
    """Follows names between enter and exit. Lives on one event loop.

    A lookup that fails, for whatever reason, leaves the last answer in force: the probes say whether servers are gone,
    and a name service that is down must not take them away.
    """

    def __init__(self, changed: Callable[[], None], resolve: Resolve | None = None) -> None:
        """changed: called after an answer that differs from the one before; if it raises, it is called again next time.

        resolve: instead of the system's resolver, which honours /etc/hosts, /etc/resolv.conf and its search list.
        """
        self._changed = changed
        self._resolve = resolve or resolve_by_system
        self._found: dict[Name, tuple[str, ...]] = {}
        self._failures: dict[Name, str] = {}
        self._first: dict[Name, asyncio.Event] = {}
        self._following: dict[Name, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Discovery:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.keep(())

    async def learn(self, names: Iterable[Name], timeout: float) -> None:
        """Follow these names too; return when each has been looked up once, or after `timeout` seconds."""
        names = set(names)
        for name in names - self._following.keys():
            self._first[name] = asyncio.Event()
            self._following[name] = asyncio.ensure_future(self._follow(name))
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):  # two classes until Python 3.11
            await asyncio.wait_for(asyncio.gather(*(self._first[name].wait() for name in names)), timeout)

    def keep(self, names: Collection[Name]) -> None:
        """Forget all other names."""
        for name in self._following.keys() - set(names):
            self._following.pop(name).cancel()
            for known in (self._found, self._failures, self._first):
                known.pop(name, None)

    def addresses(self, name: Name) -> tuple[str, ...]:
        """What was found last, as HOST:PORT, sorted; empty as long as nothing was."""
        return self._found.get(name, ())

    def state(self) -> Mapping[str, object]:
        """JSON values for the admin plane: each name with its addresses, and why the last lookup failed, if it did."""
        return {
            f"{host}:{port}": {
                "addresses": list(self.addresses((host, port))),
                "failure": self._failures.get((host, port)),
            }
            for host, port in self._following
        }

    async def _follow(self, name: Name) -> None:
        told = self.addresses(name)
        while True:
            await self._look_up(name)
            self._first[name].set()
            found = self.addresses(name)
            if found != told and self._told():
                told = found
            period = _PERIOD_SECONDS if found else _FIRST_RETRY_SECONDS
            await asyncio.sleep(period * random.uniform(0.8, 1.2))  # noqa: S311  (spread, not secrecy)

    async def _look_up(self, name: Name) -> None:
        try:
            found = addresses_of(await self._resolve(name[0]), name[1])
        except OSError as error:
            self._fail(name, error.strerror or str(error))
            return
        if not found:
            self._fail(name, "the name has no address")
            return
        self._failures.pop(name, None)
        if found != self.addresses(name):
            _log.info("%s is now %s", name[0], ", ".join(found))
            self._found[name] = found

    def _fail(self, name: Name, why: str) -> None:
        if self._failures.get(name) != why:
            _log.warning("cannot look up %s: %s; %d addresses stay known", name[0], why, len(self.addresses(name)))
            self._failures[name] = why

    def _told(self) -> bool:
        try:
            self._changed()
        except Exception:  # the edge: a lookup must not end because its answer can't be used now
            _log.exception("new addresses could not be taken over")
            return False
        return True


def addresses_of(hosts: Collection[str], port: int) -> tuple[str, ...]:
    """HOST:PORT of each, sorted. Of a name with both kinds of addresses only IPv4: they lead to the same servers."""
    v4 = sorted({host for host in hosts if ":" not in host})
    v6 = sorted({host for host in hosts if ":" in host})
    return tuple(f"{host}:{port}" for host in v4) or tuple(f"[{host}]:{port}" for host in v6)


async def resolve_by_system(host: str) -> Sequence[str]:
    """The addresses of a name.

    In a thread of its own, which does not keep the process from ending: the loop's own threads are few and joined at
    the end, and a resolver without a server to ask waits for half a minute.

    :raises OSError: if there is no answer.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Sequence[str]] = loop.create_future()

    def deliver(addresses: Sequence[str], error: OSError | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(addresses)
        else:
            done.set_exception(error)

    def look_up() -> None:
        addresses: list[str] = []
        error: OSError | None = None
        try:
            addresses = [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError) as wrong:
            error = wrong if isinstance(wrong, OSError) else OSError(0, f"'{host}' can't be a host name")
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(deliver, addresses, error)

    threading.Thread(target=look_up, name=f"look-up {host}", daemon=True).start()
    return await done
