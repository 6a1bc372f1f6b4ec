"""What a peer speaks that does not speak HTTP/2, told by its first bytes however few they are."""

from __future__ import annotations

import pytest

from gateway.http2.engine import Engine, client_engine, server_engine
from gateway.http2.frames import PREFACE, EngineError
from gateway.http2.limits import Limits
from gateway.http2.strangers import HTTP1, HTTP2, OTHER, TLS, NotHttp2, answer_to, speaks

FIRST = {
    "a request": (b"GET / HTTP/1.1\r\n", HTTP1),
    "an odd method": (b"PROPFIND /x HTTP/1.1\r\n", HTTP1),
    "one letter": (b"G", HTTP1),
    "like the preface": (b"PUT / HTTP/1.1", HTTP1),
    "a ClientHello": (b"\x16\x03\x01\x02\x00\x01", TLS),
    "the preface": (PREFACE, HTTP2),
    "its beginning": (PREFACE[:3], HTTP2),
    "small letters": (b"get / HTTP/1.1", OTHER),
    "no text": (b"\x00\x01", OTHER),
    "nothing": (b"", OTHER),
}


@pytest.mark.parametrize(("first", "expected"), FIRST.values(), ids=FIRST)
def test_the_first_bytes_tell(first: bytes, expected: str) -> None:
    assert speaks(first) == expected


def feed(engine: Engine, data: bytes, at_once: int) -> None:
    for start in range(0, len(data), at_once):
        engine.receive_data(data[start : start + at_once])


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"\0\0\0"])
@pytest.mark.parametrize("at_once", [1, 100])
def test_a_server_says_what_its_client_speaks(first: bytes, at_once: int) -> None:
    with pytest.raises(NotHttp2) as raised:
        feed(server_engine(Limits()), first, at_once)
    assert raised.value.speaks == speaks(first)


@pytest.mark.parametrize(
    ("answer", "expected"), [(b"HTTP/1.1 400 Bad Request\r\n", HTTP1), (b"\x16\x03\x03\x00\x50\x02\x00\x00\x4c", TLS)]
)
def test_a_client_says_what_its_server_speaks(answer: bytes, expected: str) -> None:
    with pytest.raises(NotHttp2) as raised:
        client_engine(Limits()).receive_data(answer)
    assert raised.value.speaks == expected


def test_a_client_reads_an_alert_that_is_shorter_than_a_frames_header() -> None:
    engine = client_engine(Limits())
    engine.receive_data(b"\x15\x03\x01\x00\x02\x02\x46")
    assert engine.maybe_stranger is not None
    assert engine.maybe_stranger.speaks == TLS


def test_the_answer_is_in_what_the_peer_speaks() -> None:
    head, _, body = answer_to(HTTP1, "this is gRPC").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    with pytest.raises(EngineError, match="not SETTINGS: this is TLS"):
        client_engine(Limits()).receive_data(answer_to(HTTP2, "this is TLS"))
    assert answer_to(TLS, "")[:1] == b"\x15"
    assert answer_to(OTHER, "words") == b""
