"""A `WireServer` as a program, so that its CPU time and memory can be read from outside: `target.py [JSON]`.

JSON: {"limits": fields of Limits, "server": arguments of WireServer, "files": most open files}. Prints its port, serves
until SIGTERM. `/test.Service/Stats` answers what it has counted, and how late its event loop was at worst since then.
"""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop

from gateway.forward.server import ForwardMethod, WireServer
from gateway.wire.limits import Limits
from gateway.wire.server import ServerCall

BEAT = 0.005  # seconds


class Counters:
    def __init__(self) -> None:
        self.executions = 0
        self.sleeping = 0
        self.most_sleeping = 0
        self.lag = 0.0

    async def watch_lag(self) -> None:
        """Late counts only as far as this process was at work: other processes must not make it look so."""
        loop = asyncio.get_running_loop()
        while True:
            due, worked = loop.time() + BEAT, time.process_time()
            await asyncio.sleep(BEAT)
            self.lag = max(self.lag, min(loop.time() - due, time.process_time() - worked))


def methods(counters: Counters, server: list[WireServer]) -> dict[str, ForwardMethod]:
    def fast(call: ServerCall) -> None:
        counters.executions += 1
        call.reply(call.body)

    def large(call: ServerCall) -> None:
        counters.executions += 1
        call.reply(bytes(int(call.body)))

    def stats(call: ServerCall) -> None:
        told = {
            "executions": counters.executions,
            "sleeping": counters.sleeping,
            "most_sleeping": counters.most_sleeping,
            "lag": counters.lag,
            "calls": server[0].calls - 1,
            "connections": server[0].connections,
        }
        counters.lag = 0.0
        counters.most_sleeping = counters.sleeping
        call.reply(json.dumps(told).encode())

    def count(call: ServerCall) -> None:
        call.reply(b"%d" % len(call.body))

    unary = {"Fast": fast, "Count": count, "Large": large, "Stats": stats}
    return {f"/test.Service/{name}": ForwardMethod(handle) for name, handle in unary.items()}


def handlers(counters: Counters) -> dict[str, dict[str, Any]]:
    async def echo(request: bytes, context: Any) -> bytes:
        counters.executions += 1
        return request

    async def sleep(request: bytes, context: Any) -> bytes:
        counters.executions += 1
        counters.sleeping += 1
        counters.most_sleeping = max(counters.most_sleeping, counters.sleeping)
        try:
            await asyncio.sleep(60)
        finally:
            counters.sleeping -= 1
        return request

    async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    return {
        "inference.GRPCInferenceService": {"ServerLive": grpc.unary_unary_rpc_method_handler(echo)},
        "test.Service": {
            "Sleep": grpc.unary_unary_rpc_method_handler(sleep),
            "Stream": grpc.stream_stream_rpc_method_handler(stream),
        },
    }


async def main(given: dict[str, Any]) -> None:
    if "files" in given:
        resource.setrlimit(resource.RLIMIT_NOFILE, (given["files"], given["files"]))
    counters = Counters()
    limits: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.get("limits", {}).items()
    }
    servers: list[WireServer] = []
    server = WireServer(methods(counters, servers), Limits(**limits), **given.get("server", {}))
    servers.append(server)
    for service, of_service in handlers(counters).items():
        server.add_registered_method_handlers(service, of_service)
    print(server.listen("127.0.0.1:0"), flush=True)
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    watching = asyncio.ensure_future(counters.watch_lag())
    await stop.wait()
    watching.cancel()
    await server.stop()


if __name__ == "__main__":
    uvloop.run(main(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}))
