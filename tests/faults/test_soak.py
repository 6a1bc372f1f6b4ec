"""Good, cancelled, timed-out, vanishing and malformed callers for a while, and then all is as before."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from books import Servers, Write
from command_line import command, free_address
from inside import looking_inside, settled
from ledger import OPTIONS, Ledger, calling, request
from traffic import http, until, until_readyz
from tritonclient.grpc import service_pb2_grpc

SECONDS = min(1800.0, float(os.environ.get("SOAK_SECONDS", "5")))
WARM = 5.0 if "SOAK_SECONDS" in os.environ else 3.0  # seconds
MIB = 1 << 20
SLOPE = 1.0  # MiB in ten minutes
ROOM = 8.0  # MiB besides, for what an allocator keeps for next time
LAG = 0.05  # seconds that timers may be late when all is over; under load that is what else the machine does

pytestmark = pytest.mark.timeout(SECONDS + 300)


def memory(pid: int) -> float:
    """MiB that are resident."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


class Bad:
    """A fifth of the calls: each ends otherwise than it should, and nobody looks at how."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._address = address
        self._ids = 0
        self.going = True

    async def run(self) -> None:
        while self.going:
            with contextlib.suppress(grpc.aio.AioRpcError, OSError, asyncio.CancelledError):
                await random.choice((self.cancels, self.gives_up, self.vanishes, self.sends_nonsense))()
            await asyncio.sleep(0.02)

    def _request(self) -> Any:
        self._ids += 1
        return request(f"bad-{self._ids}")

    async def cancels(self) -> None:
        async with grpc.aio.insecure_channel(self._address, OPTIONS) as channel:
            call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(self._request())
            await asyncio.sleep(random.uniform(0, 0.02))
            call.cancel()
            await call

    async def gives_up(self) -> None:
        async with grpc.aio.insecure_channel(self._address, OPTIONS) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            await stub.ModelInfer(self._request(), timeout=random.uniform(0.001, 0.02))

    async def vanishes(self) -> None:
        """In the middle of a call, without a word."""
        channel = grpc.aio.insecure_channel(self._address, OPTIONS)
        streaming = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer()
        await streaming.write(self._request())
        await channel.close(0)

    async def sends_nonsense(self) -> None:
        _, writer = await asyncio.open_connection(self._host, int(self._port))
        writer.write(
            random.choice((b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + random.randbytes(200)))
        )
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.transport.abort()


async def test_memory_descriptors_and_tasks_are_back_after_a_mix_of_callers(
    servers: Servers, write_config: Write, tmp_path: Path
) -> None:
    server = servers.start(5)
    address, ledger = free_address(), Ledger()
    arguments = ("serve", "--config", str(write_config(server.address)), "--listen", address)
    async with command(*arguments, folder=tmp_path, environ=looking_inside(tmp_path)) as running:
        _, admin = await running.until_serving()
        await until_readyz(admin, True, within=30)
        tasks = (await settled(tmp_path)).lasting
        before = descriptors(running.pid)
        bad = Bad(address)
        async with calling(address, ledger, unary=6, streams=2, timeout=20.0):
            callers = [asyncio.ensure_future(bad.run()) for _ in range(2)]
            await asyncio.sleep(WARM)
            await until(lambda: ledger.good() > 300, 30, "calls")
            warm, since = memory(running.pid), time.monotonic()
            await asyncio.sleep(SECONDS)
            grown, took = memory(running.pid) - warm, time.monotonic() - since
            bad.going = False
            await asyncio.gather(*callers)
        assert grown <= ROOM + SLOPE * took / 600, f"{grown:.1f} MiB in {took:.0f} s"
        await until(lambda: descriptors(running.pid) <= before + 4, 20, "descriptors as before")  # two to the server
        after = await settled(tmp_path)
        assert after.lasting == tasks, f"{after.lasting - tasks} more, {tasks - after.lasting} less"
        for _ in range(60):  # a machine that is busy makes them late as well
            if after.usual_lag < LAG:
                break
            after = await settled(tmp_path)
        assert after.usual_lag < LAG, f"timers are {after.usual_lag:.3f} s late"
        _, state = await http(admin, "/state")
        assert not any(each["in_flight"] for pool in state["upstreams"].values() for each in pool)
        running.signal(signal.SIGTERM)
        assert await running.wait() == 0
        lag = f"{after.usual_lag * 1000:.1f} ms (one in a thousand {after.rare_lag * 1000:.1f})"
        print(f"{grown:.2f} MiB in {took:.0f} s, {ledger.good()} good calls, {tasks.total()} tasks, timers {lag} late")
    assert "Traceback" not in running.errors
    assert "never retrieved" not in running.errors
    assert not ledger.failed(), ledger.failed()
    assert ledger.good() > 100
