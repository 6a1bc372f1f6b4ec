"""An HTTP server in this process that takes what a program under test posts, such as an OTLP exporter."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web


@contextlib.asynccontextmanager
async def receiving(path: str, post: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    """Hand POSTs to `path` to `post`; gives the server's URL, without a path."""
    app = web.Application()
    app.router.add_post(path, post)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
