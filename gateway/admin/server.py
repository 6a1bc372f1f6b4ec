"""Admin: the HTTP server. May depend on values, sockets and aiohttp; what it shows comes through `StateSource`.

GET /          the page that an on-call person opens first; it loads files under /page/
GET /healthz   200 while the process is healthy, 503 when it should be restarted
GET /readyz    200 when it should get traffic, else 503; JSON: {"ready": …, "reasons": [what is not ready]}
GET /metrics   OpenMetrics or Prometheus text, by the Accept header
GET /config    JSON: the config in force by digest and source, the findings of the last refused one, recent changes
GET /verdicts  JSON: what experiments say so far; found about once a minute
GET /history   JSON: the last hour of models that were called, a point a minute
GET /state     JSON: public models → variants → endpoints, with their current state, and what needs attention
POST /rollouts/NAME/ACTION   promote, pause, resume or abort a rollout; JSON: {"done": …} or {"error": …}

All others are read-only. Answers contain no secrets, but name models and addresses: listen where only operators can
reach, or say who may (`guard`).
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from types import TracebackType
from typing import Final, Protocol

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from gateway.admin.alerts import notices
from gateway.admin.connections import Connections
from gateway.admin.guard import AdminAccess, maybe_refusal, maybe_refusal_of_change
from gateway.admin.page import page_routes
from gateway.admin.preface import Asked, FirstBytes
from gateway.config.units import is_loopback_host
from gateway.errors import CommandFailed
from gateway.transport.sockets import bind

_SOCKET_MODE = 0o600  # the supervisor, which asks a worker, is the same user
ASKED_BY = "x-asked-by"
_GRACE_SECONDS = 1.0  # for answers at the end; all of them are short
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


_log = logging.getLogger(__name__)


def _is_no_bad_request(record: logging.LogRecord) -> bool:
    """Drop the log records, with stacks, that aiohttp writes when a client sends bytes that are not HTTP and gets
    400."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)


class StateSource(Protocol):
    """The data that the admin plane shows. Every method returns at once, from memory."""

    def is_live(self) -> bool:
        """Is the process healthy? False asks for a restart, so only a fault that a restart mends counts, and no
        upstream's."""
        ...

    def readiness(self) -> tuple[bool, Sequence[str]]:
        """May traffic come? And what is not ready, in words."""
        ...

    def state(self) -> Mapping[str, object]:
        """JSON values: public models → variants → endpoints, with their current state."""
        ...

    def config(self) -> Mapping[str, object]:
        """JSON values without secrets; see `ConfigHistory.config`."""
        ...


Order = Callable[[str, str, str], Awaitable[tuple[int, Mapping[str, object]]]]
"""Does something to a rollout: its name, what, and who asks; answers an HTTP status and JSON values."""


Verdicts = Callable[[], Awaitable[Sequence[Mapping[str, object]]]]
"""Says how experiments stand: JSON values of those of which something is known."""


GUARD: Final = "guard"
"""The key under which a worker tells its supervisor who may read the admin plane, as its config says now."""


class CannotListen(CommandFailed):
    """The admin address is taken or not allowed; the text says which, and what to do."""


class Admin:
    """Serves the admin plane between enter and exit."""

    def __init__(
        self,
        source: StateSource,
        listen: str,
        metrics: Callable[[str], tuple[bytes, str]],
        connections: Connections | None = None,
        access: AdminAccess | None = None,
        *,
        order: Order | None = None,
        verdicts: Verdicts | None = None,
        history: Callable[[], Mapping[str, object]] | None = None,
    ) -> None:
        """
        listen:      "HOST:PORT" (port 0 takes a free one, "[::1]:9000" for IPv6) or "unix:PATH".
        metrics:     makes body and content type for an Accept header (`Scrape.render`); it is called in a thread.
        connections: limits their number and time.
        access:      who may read it; None: everybody who gets here.
        order:       does something to a rollout; None: nothing can be done here.
        verdicts:    of experiments; None: there are none here.
        history:     JSON values of the last hour; None if another process has them.
        raises:      ValueError if `listen` is neither form.
        """
        self._source = source
        self._listen = listen
        self._metrics = metrics
        self._place = _parse(listen)
        self._connections = Connections() if connections is None else connections
        self._access = access or AdminAccess()
        self._order = order
        self._verdicts = verdicts
        self._history = history or dict
        self._is_local = isinstance(self._place, tuple) and is_loopback_host(self._place[0])
        self._asked: Asked = {}
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server

    def guard(self, access: AdminAccess) -> None:
        """Let in who has one of these tokens from now on; and nobody who has another. TLS stays as it is."""
        self._access = replace(access, tls=self._access.tls)

    @property
    def address(self) -> str:
        """The address, in the form of `listen`, with the real port."""
        if self._runner is None or isinstance(self._place, str) or not self._server.sockets:
            return self._listen
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def __aenter__(self) -> Admin:
        """:raises CannotListen: if the address is taken, forbidden or not of this machine."""
        _log.addFilter(_is_no_bad_request)
        runner = web.AppRunner(
            self._app(), access_log=None, logger=_log, shutdown_timeout=_GRACE_SECONDS, handle_signals=False
        )
        await runner.setup()
        try:
            self._server = await self._listening(runner)
        except OSError as error:
            await runner.cleanup()
            raise CannotListen(_explain(error, self._listen)) from error
        if isinstance(self._place, str):
            os.chmod(self._place, _SOCKET_MODE)
        self._runner = runner
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        runner, self._runner = self._runner, None
        if runner:
            self._server.close()
            await runner.cleanup()
            if isinstance(self._place, str):
                with suppress(FileNotFoundError):
                    os.unlink(self._place)  # before Python 3.13, event loops leave the socket's file

    async def _listening(self, runner: web.AppRunner) -> asyncio.Server:
        loop, http = asyncio.get_running_loop(), runner.server
        assert http is not None  # noqa: S101  # for the type checker: it is set up

        def first_bytes() -> FirstBytes:
            return FirstBytes(http, self._connections, self._asked)

        if isinstance(self._place, str):
            return await loop.create_unix_server(first_bytes, self._place)
        host, port = self._place
        if ":" in host:
            # `bind`, since the loop's own socket for "::" would take no IPv4
            return await loop.create_server(first_bytes, sock=bind(host, port), ssl=self._access.context())
        return await loop.create_server(first_bytes, host, port, ssl=self._access.context())

    def _app(self) -> web.Application:
        app = web.Application(middlewares=[self._answering])
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._scrape),
                web.get("/config", self._config),
                web.get("/state", self._state),
                web.post("/rollouts/{name}/{action}", self._rollout),
                web.get("/verdicts", self._say_verdicts),
                web.get("/history", self._last_hour),
                *page_routes(),
            ]
        )
        return app

    @web.middleware
    async def _answering(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note, while entered, that the connection is being answered."""
        connection = self._asked.get(request.protocol)
        with connection.answering() if connection is not None else nullcontext():
            refusal = maybe_refusal(self._access, request, is_local=self._is_local)
            return refusal if refusal is not None else await handler(request)

    async def _healthz(self, request: web.Request) -> web.Response:
        live = self._source.is_live()
        return _json({"live": live}, 200 if live else 503)

    async def _readyz(self, request: web.Request) -> web.Response:
        ready, reasons = self._source.readiness()
        return _json({"ready": ready, "reasons": list(reasons)}, 200 if ready else 503)

    async def _scrape(self, request: web.Request) -> web.Response:
        # A large scrape takes tens of milliseconds, too long for the event loop.
        body, content_type = await asyncio.to_thread(self._metrics, request.headers.get("Accept", ""))
        return web.Response(body=body, headers={**_HEADERS, "Content-Type": content_type})

    async def _config(self, request: web.Request) -> web.Response:
        config = self._source.config()
        if isinstance(self._place, str):  # a supervisor's question, who guards a port of its own by what a worker reads
            config = {**config, GUARD: self._access.told}
        return _json(config)

    async def _say_verdicts(self, request: web.Request) -> web.Response:
        return _json({"verdicts": list(await self._verdicts()) if self._verdicts is not None else []})

    async def _last_hour(self, request: web.Request) -> web.Response:
        return await asyncio.to_thread(
            lambda: _json(self._history(), indent=None)
        )  # thousands of numbers, for programs

    async def _state(self, request: web.Request) -> web.Response:
        state, config = self._source.state(), self._source.config()
        # The state of a thousand models is megabytes, too much for the event loop.
        return await asyncio.to_thread(lambda: _json({**state, "attention": notices(state, config)}))

    async def _rollout(self, request: web.Request) -> web.Response:
        refusal = maybe_refusal_of_change(self._access, request)
        if refusal is not None:
            return refusal
        if self._order is None:
            return _json({"error": "there is nothing to be done here"}, 404)
        # The supervisor asks a worker over a socket that only this user may use, for whoever asked it.
        asker = request.headers.get(ASKED_BY, "") if isinstance(self._place, str) else f"{request.remote} (admin)"
        status, told = await self._order(request.match_info["name"], request.match_info["action"], asker)
        return _json(told, status)


def _json(value: Mapping[str, object], status: int = 200, indent: int | None = 2) -> web.Response:
    """indent: people read it with curl."""
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    return web.Response(text=text, status=status, headers=_HEADERS, content_type="application/json")


def _parse(listen: str) -> str | tuple[str, int]:
    """A socket's path, or host and port."""
    if listen.startswith("unix:"):
        path = listen.removeprefix("unix:")
        if path:
            return path
    host, colon, port = listen.rpartition(":")
    if colon and host and port.isascii() and port.isdigit() and int(port) <= 65535:
        return host.removeprefix("[").removesuffix("]"), int(port)
    raise ValueError(f"'{listen}' is not an address to listen on: write HOST:PORT, [IPV6]:PORT or unix:PATH")


def _explain(error: OSError, listen: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"the admin address {listen} is taken by another process: stop it, or choose another address"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"this user may not listen on the admin address {listen}: choose a port above 1023 or another path"
    return f"the admin plane cannot listen on {listen}: {error.strerror or error}"
