"""What is collected whole, inflated or queued: bounded in bytes, worked off in slices, with honest calls beside.

The numbers are those of attacks that once made a worker grow by a gigabyte, and stopped its loop for seconds.
"""

from __future__ import annotations

import gzip
import os
import time
from collections.abc import Iterator

import pytest
from frames import END_STREAM, Peer, data, message, rst, u32
from processes import FAST, STREAM, Honest, Served, gateway, head, request, target
from slowness import slowness
from tritonclient.grpc import service_pb2 as pb
from upstreams import INFER, FakeTriton, infer_request

KiB, MiB = 1 << 10, 1 << 20
COUNT = b"/test.Service/Count"
UNARY, LIVE = b"/test.Service/Sleep", b"/inference.GRPCInferenceService/ServerLive"
GZIP = (b"grpc-encoding", b"gzip")
COLLECTED = 64 * MiB


@pytest.fixture(scope="module")
def bounded() -> Iterator[Served]:
    with target(limits={"collected_bytes": COLLECTED}) as served:
        yield served


def unfinished(peer: Peer, opening: bytes, stream: int, start: bytes, size: int) -> None:
    """A call whose message has come but for its end."""
    peer.send(opening + data(stream, start))
    piece = bytes(16_384)
    for _ in range(0, size, len(piece)):
        peer.send(data(stream, piece))


@pytest.mark.parametrize(
    ("path", "extra", "flag"),
    [(UNARY, (), 0), (STREAM, (), 0), (UNARY, (GZIP,), 1)],
    ids=["unary", "stream", "compressed"],
)
def test_unfinished_messages_on_one_connection_take_no_more_than_its_budget(
    path: bytes, extra: tuple[tuple[bytes, bytes], ...], flag: int, bounded: Served
) -> None:
    """24 of 24 MiB."""
    size, memory = 24 * MiB, bounded.memory
    with Honest(bounded.port, COUNT, bytes(50 * KiB)) as honest, bounded.connect() as peer:
        for stream in range(1, 49, 2):
            unfinished(peer, head(path, *extra, stream=stream), stream, bytes((flag,)) + u32(size), size - 16_384)
        refused = [peer.answer(stream) for stream in range(41, 49, 2)]
        assert {answer.status for answer in refused} == {"8"}
        assert "limit of 67108864 bytes" in refused[0].text
        assert bounded.memory - memory < COLLECTED + 24 * MiB
        peer.send(request(FAST, bytes(10 * KiB), stream=49))  # a small one on the same connection
        assert peer.answer(49).status == "0"
    assert honest.held()


def test_tensors_before_the_name_take_no_more_than_the_budget(triton: FakeTriton) -> None:
    """24 of 24 MiB, whose name would come last."""
    tensor = b"\x3a" + _varint(24 * MiB)
    with triton.served() as upstream, gateway(upstream, "server: {max_collected_bytes: 128MiB}") as served:
        memory = served.memory
        with Honest(served.port, INFER, infer_request()) as honest, served.connect() as peer:
            for stream in range(1, 49, 2):
                start = b"\0" + u32(24 * MiB + 8) + tensor
                unfinished(peer, head(INFER, stream=stream), stream, start, 24 * MiB - 16_384)
            answers = [peer.answer(stream) for stream in range(41, 49, 2)]
            assert {answer.status for answer in answers} == {"8"}
            assert served.memory - memory < 64 * MiB + 64 * MiB  # a connection's half, and joins on the way
        assert honest.held()


def _varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out, number = out + bytes((number & 0x7F | 0x80,)), number >> 7
    return out + bytes((number,))


def test_methods_that_need_little_refuse_more_by_the_prefix(product: Served) -> None:
    with product.connect() as peer:
        peer.send(head(LIVE) + data(1, b"\0" + u32(64 * KiB + 1)))
        assert peer.answer(1).status == "8"
        body = pb.ModelMetadataRequest(name="x" * 60_000).SerializeToString()
        peer.send(request(b"/inference.GRPCInferenceService/ModelMetadata", body, stream=3))
        assert peer.answer(3).status == "5"


# Compression


@pytest.mark.parametrize(
    "plain",
    [bytes(8 * MiB), b"\xff\x00" * (4 * MiB), b"\x01\0\0\0\0\0\0\0" * MiB, os.urandom(8 * MiB)],
    ids=["zeros", "mask", "padded ids", "random"],
)
def test_a_tensor_may_come_compressed_however_well_it_does(plain: bytes, echo: Served) -> None:
    with echo.connect() as peer:
        peer.send(head(b"/test.Service/Sleep", GZIP))  # a neighbour on the same connection
        sent = b"".join(_pieces(3, message(gzip.compress(plain, 6), 1)))
        peer.send(head(COUNT, GZIP, stream=3) + sent)
        assert peer.answer(3).body[5:] == b"%d" % len(plain)


def _pieces(stream: int, whole: bytes) -> Iterator[bytes]:
    for at in range(0, len(whole), 16_384):
        piece = whole[at : at + 16_384]
        yield data(stream, piece, END_STREAM if at + len(piece) == len(whole) else 0)


def test_inflating_a_large_body_does_not_hold_the_loop(echo: Served) -> None:
    """Bodies of 250 KB that become 240 MiB each, four at once, with calls beside that are compressed as well."""
    body = message(gzip.compress(bytes(240 * MiB), 9), 1)
    small = gzip.compress(b"honest")
    echo.stats()
    with Honest(echo.port) as honest, echo.connect() as peer, echo.connect() as other:
        for stream in range(1, 9, 2):
            peer.send(head(COUNT, GZIP, stream=stream) + b"".join(_pieces(stream, body)))
        other.send(head(FAST, GZIP) + data(1, message(small, 1), END_STREAM))
        assert other.answer(1).body == message(b"honest")
        statuses = [peer.answer(stream).status for stream in range(1, 9, 2)]
    assert set(statuses) <= {"0", "8"}  # what is inflated counts in the budget
    assert "0" in statuses
    assert honest.held()
    assert echo.stats()["lag"] < 0.1 * slowness()


# Many small things


@pytest.mark.parametrize("end", ["reset", "close"])
def test_a_cancelled_stream_of_empty_messages_is_not_worked_off(end: str, echo: Served) -> None:
    """1 MiB of them: 209,000 in each of eight streams, and then the caller goes."""
    echo.stats()
    with Honest(echo.port) as honest:
        for _ in range(2):
            with echo.connect() as peer:
                for stream in range(1, 9, 2):
                    peer.send(head(STREAM, stream=stream))
                    peer.send(b"".join(data(stream, bytes(16_380)) for _ in range(60)))
                time.sleep(0.1)
                cpu = echo.cpu
                if end == "reset":
                    peer.send(b"".join(rst(stream) for stream in range(1, 9, 2)))
            time.sleep(0.3)
            assert echo.cpu - cpu < 0.25 * slowness()
    assert honest.held()
    assert echo.stats()["lag"] < 0.1 * slowness()


@pytest.mark.parametrize("end", ["reset", "close"])
def test_a_cancelled_model_stream_is_not_worked_off(end: str, product: Served) -> None:
    path = b"/inference.GRPCInferenceService/ModelStreamInfer"
    with Honest(product.port, INFER, infer_request()) as honest:
        with product.connect() as peer:
            for stream in range(1, 17, 2):
                peer.send(head(path, stream=stream))
                peer.send(b"".join(data(stream, bytes(16_380)) for _ in range(60)))
            time.sleep(0.2)
            cpu = product.cpu
            if end == "reset":
                peer.send(b"".join(rst(stream) for stream in range(1, 17, 2)))
        time.sleep(0.5)
        assert product.cpu - cpu < 0.4 * slowness()
    assert honest.held()


def test_messages_for_a_slow_handler_stay_bytes(product: Served) -> None:
    """1 MiB of empty messages to reflection, whose handler answers each: they once became 12.5 MiB of objects."""
    path = b"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    memory = product.memory
    with product.connect() as peer:
        for stream in range(1, 17, 2):
            peer.send(head(path, stream=stream))
            peer.send(b"".join(data(stream, bytes(16_380)) for _ in range(60)))
        peer.wait(lambda: False, 1.0)
        assert product.memory - memory < 8 * 2 * MiB + 8 * MiB
