"""The worst that callers can have a container of 512 MiB keep, all at once: nobody is killed, small calls are answered.

Short here; `make soak` has it go on for longer, ten minutes at most (SOAK_SECONDS).
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import command
from frames import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW,
    PING,
    Frame,
    Peer,
    block,
    connect,
    data,
    headers,
    message,
    ping,
    u32,
)
from frames import window as window_update
from memory_groups import MemoryGroup, memory_group, needs_cgroup
from PIL import Image
from processes import Honest, head, request
from traffic import config, http, until, write
from tritonclient.grpc import service_pb2 as pb
from upstreams import INFER, FakeTriton, RawServer, accept_client, infer_request, raw_triton

SECONDS = min(600.0, float(os.environ.get("SOAK_SECONDS", "4")))
KiB, MiB = 1 << 10, 1 << 20
LIMIT = 512 * MiB
STREAM = INFER.replace(b"ModelInfer", b"ModelStreamInfer")

pytestmark = [needs_cgroup, pytest.mark.timeout(SECONDS + 300)]


# Who keeps the gateway busy. Each has a connection of its own, and takes another one when it is closed.


def pieces(peer: Peer, stream: int, body: bytes, *, end: bool) -> bool:
    """Send a message in frames. Answers whether the connection lives."""
    whole = memoryview(body)
    for at in range(0, len(whole), 16_384):
        is_last = end and at + 16_384 >= len(whole)
        if not peer.send(data(stream, bytes(whole[at : at + 16_384]), END_STREAM if is_last else 0)):
            return False
    return True


def collected(peer: Peer) -> None:
    """Messages of 24 MiB whose names come last, and which never end."""
    body = b"\0" + u32(24 * MiB) + b"\x3a\x80\x80\x80\x0c" + bytes(20 * MiB)
    for stream in range(1, 17, 2):
        peer.send(head(INFER, stream=stream))
        if not pieces(peer, stream, body, end=False):
            return
    hear(peer, 3.0)


def stalled(peer: Peer) -> None:
    """As many large requests as windows allow, to a server that takes none of them."""
    body = message(infer_request("stalled", size=2 * MiB))[: MiB - 64 * KiB]
    for stream in range(1, 127, 2):
        peer.send(head(INFER, stream=stream))
        if not pieces(peer, stream, body, end=False):
            return
    hear(peer, 3.0)


def streamed(peer: Peer) -> None:
    """Streams whose requests no server takes, and whose answers nobody reads."""
    body = message(infer_request("stalled", size=200 * KiB)) * 4
    for stream in range(1, 65, 2):
        peer.send(head(STREAM, stream=stream))
        if not pieces(peer, stream, body, end=False):
            return
    hear(peer, 3.0)


def unread(peer: Peer) -> None:
    """Answers of 4 MiB into a window of nothing."""
    for stream in range(1, 17, 2):
        peer.send(request(INFER, infer_request("good", str(4 * MiB)), stream=stream))
    hear(peer, 3.0)


BOMB = gzip.compress(bytes(48 * MiB), 9)


def bombs(peer: Peer) -> None:
    """Messages that grow a thousandfold."""
    for stream in range(1, 9, 2):
        peer.send(head(INFER, (b"grpc-encoding", b"gzip"), stream=stream))
        pieces(peer, stream, message(BOMB, 1), end=True)
    hear(peer, 2.0)


def picture() -> bytes:
    """A hundred bytes that take some 90 MiB."""
    written = io.BytesIO()
    Image.new("RGBA", (5000, 1500)).save(written, "WebP", lossless=True, method=0, quality=0)
    asked = pb.ModelInferRequest(model_name="pictures")
    asked.inputs.add(name="image", datatype="BYTES", shape=[1])
    asked.raw_input_contents.append(len(written.getvalue()).to_bytes(4, "little") + written.getvalue())
    return bytes(asked.SerializeToString())


PICTURE = picture()


def pictures(peer: Peer) -> None:
    for stream in range(1, 17, 2):
        peer.send(request(INFER, PICTURE, stream=stream))
    hear(peer, 2.0)


def hear(peer: Peer, seconds: float) -> None:
    """Take nothing back but what the connection needs to live."""
    until_ = time.monotonic() + seconds
    while time.monotonic() < until_:
        with contextlib.suppress(TimeoutError):
            got = peer.read(0.2)
            if got is None:
                return
            if got.kind == PING and not got.flags & ACK:
                peer.send(ping(got.payload, ACK))


MADE = ("are refused, and nothing is kept", "is closed, which held")
"""What the gateway says once the mix is as strong as it is meant to be."""

MIX: dict[Callable[[Peer], None], int] = {collected: 6, stalled: 10, streamed: 4, unread: 4, bombs: 2, pictures: 3}
"""How many connections each has."""


@contextlib.contextmanager
def worst_mix(port: int) -> Iterator[None]:
    over = threading.Event()

    def run(play: Callable[[Peer], None]) -> None:
        while not over.wait(0.05):
            with contextlib.suppress(OSError), connect(port) as peer:
                peer.greet([(INITIAL_WINDOW, 0)])
                play(peer)

    threads = [threading.Thread(target=run, args=(play,)) for play, count in MIX.items() for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


# What they have in front of them

UNIMPLEMENTED = block(((b":status", b"200"), (b"content-type", b"application/grpc"), (b"grpc-status", b"12")))


def takes_nothing(peer: Peer, number: int) -> None:
    """A server that answers probes, and takes no byte of a request."""
    accept_client(peer, ((INITIAL_WINDOW, 0),))
    heads: dict[int, Frame] = {}
    while (got := peer.read(60.0)) is not None:
        if got.kind == PING and not got.flags & ACK:
            peer.send(ping(got.payload, ACK))
        if got.kind == HEADERS and not dict(got.fields)[":path"].endswith("Infer"):
            heads[got.stream] = got
            peer.send(window_update(got.stream, 1024))
        if got.kind in (HEADERS, DATA) and got.flags & END_STREAM and got.stream in heads:
            asked = heads.pop(got.stream)
            if dict(asked.fields)[":path"].endswith(("/ServerLive", "/ModelReady")):
                raw_triton(peer, asked)
            else:
                peer.send(headers(asked.stream, UNIMPLEMENTED, END_HEADERS | END_STREAM))


def written(folder: Path, good: int, stalls: int) -> Path:
    def model(upstream: str) -> dict[str, object]:
        return {"variants": {"only": {"upstream": upstream, "model": upstream}}}

    pipeline = {
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1]}],
        "outputs": [{"name": "image", "datatype": "FP32", "shape": [3, 32, 32]}],
        "steps": [{"step": "decode_image", "with": {"size": 32, "resize": 32}}],
    }
    models = {"good": model("good"), "stalled": model("stalls"), "pictures": {"pipeline": pipeline}}
    upstreams = {"good": f"127.0.0.1:{good}", "stalls": f"127.0.0.1:{stalls}"}
    return write(folder / "gateway.yaml", config(upstreams, models))


@pytest.fixture
def container() -> Iterator[MemoryGroup]:
    with memory_group(LIMIT) as group:
        yield group


async def test_the_worst_mix_in_a_small_container_ends_no_process_and_no_small_call(
    container: MemoryGroup, tmp_path: Path
) -> None:
    with FakeTriton().served() as good, RawServer(takes_nothing) as stalls:
        file = written(tmp_path, good, stalls.port)
        async with command("serve", "--config", str(file), folder=tmp_path, start=container.start) as running:
            address, admin = await running.until_serving()
            port = int(address.rpartition(":")[2])
            with Honest(port, INFER, infer_request("good", "7")) as honest, worst_mix(port):
                await asyncio.sleep(SECONDS)
                await until(lambda: all(each in running.errors for each in MADE), 60, "a mix that is strong enough")
                assert container.kills == 0, f"{container.kills} killed\n{running.errors}"
                _, state = await http(admin, "/state")
            told = f"{container.number('memory.failcnt')} times at the limit; {state['memory']}\n{running.errors}"
            assert container.kills == 0, told
            assert running.process.returncode is None, told
            assert honest.held(), f"{honest.worst} {honest.failures}\n{told}"
            await until_calm(admin)
            with Honest(port, INFER, infer_request("good", "7")) as new:
                pass
            assert new.held()
            print(told, len(honest.seconds), honest.worst)


async def until_calm(admin: str) -> None:
    """Everything is given back once the callers are gone, and nothing is refused any more."""
    memory: dict[str, object] = {}

    async def look() -> bool:
        memory.update((await http(admin, "/state"))[1]["memory"])
        return memory["step"] == 0

    for _ in range(500):
        if await look():
            return
        await asyncio.sleep(0.2)
    raise AssertionError(f"memory stays in use: {memory}")
