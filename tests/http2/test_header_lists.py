"""Which header lists are malformed by RFC 9113 sections 8.1 to 8.3; all others come through as they are."""

from __future__ import annotations

import pytest

from gateway.http2.header_lists import (
    HeaderList,
    Malformed,
    checked_request,
    checked_response,
    checked_trailers,
    is_authority,
)
from gateway.http2.hpack import Field, NeverIndexed

POST: tuple[Field, ...] = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/s/m"), (b":authority", b"a:1"))
OK: tuple[Field, ...] = ((b":status", b"200"),)


def without(name: bytes, fields: tuple[Field, ...] = POST) -> tuple[Field, ...]:
    return tuple(field for field in fields if field[0] != name)


def with_(name: bytes, value: bytes) -> tuple[Field, ...]:
    return tuple((name, value) if field[0] == name else field for field in POST)


REQUESTS = {
    "plain": POST,
    "no authority": without(b":authority"),
    "options for all": (*with_(b":path", b"*")[1:], (b":method", b"OPTIONS")),
    "connect": ((b":method", b"CONNECT"), (b":authority", b"a:1")),
    "trailers wanted": (*POST, (b"te", b"trailers")),
    "a name twice": (*POST, (b"k", b"1"), (b"k", b"2")),
    "obs-text": (*POST, (b"k", b"\xff\x80")),
    "a tab inside": (*POST, (b"k", b"a\tb")),
    "one length twice": (*POST, (b"content-length", b"5"), (b"content-length", b"05")),
}


@pytest.mark.parametrize("fields", REQUESTS.values(), ids=REQUESTS)
def test_a_request_that_is_one_comes_through_as_it_is(fields: tuple[Field, ...]) -> None:
    assert checked_request(fields).fields == fields


MALFORMED = {
    "no method": without(b":method"),
    "no scheme": without(b":scheme"),
    "no path": without(b":path"),
    "empty path": with_(b":path", b""),
    "relative path": with_(b":path", b"s/m"),
    "star for a call": with_(b":path", b"*"),
    "space in the path": with_(b":path", b"/s /m"),
    "bad authority": with_(b":authority", b"a/b"),
    "a user in the authority": with_(b":authority", b"user@a"),
    "bad scheme": with_(b":scheme", b"http:"),
    "scheme begins with no letter": with_(b":scheme", b"+http"),
    "pseudo twice": (*POST, (b":path", b"/s/m")),
    "pseudo after regular": (*POST[:3], (b"k", b"v"), POST[3]),
    "pseudo of a response": (*POST, (b":status", b"200")),
    "unknown pseudo": (*POST, (b":protocol", b"websocket")),
    "connect with a path": ((b":method", b"CONNECT"), (b":authority", b"a:1"), (b":path", b"/")),
    "connect to nobody": ((b":method", b"CONNECT"),),
    "upper case": (*POST, (b"Key", b"v")),
    "no name": (*POST, (b"", b"v")),
    "space in a name": (*POST, (b"k ", b"v")),
    "line feed in a value": (*POST, (b"k", b"a\nb: c")),
    "null in a value": (*POST, (b"k", b"\0")),
    "delete in a value": (*POST, (b"k", b"\x7f")),
    "te other than trailers": (*POST, (b"te", b"gzip")),
    "length in words": (*POST, (b"content-length", b"five")),
    "length with a sign": (*POST, (b"content-length", b"+5")),
    "length beyond measure": (*POST, (b"content-length", b"1" * 19)),
    "two lengths": (*POST, (b"content-length", b"5"), (b"content-length", b"6")),
    **{
        name.decode(): (*POST, (name, b"x"))
        for name in (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
    },
}


@pytest.mark.parametrize("fields", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_request_is_told(fields: tuple[Field, ...]) -> None:
    with pytest.raises(Malformed):
        checked_request(fields)


def test_a_length_is_read_and_its_absence_too() -> None:
    assert checked_request((*POST, (b"content-length", b"1048576"))).length == 1 << 20
    assert checked_request(POST).length == -1


def test_space_around_a_value_goes_and_what_must_not_be_indexed_stays_so() -> None:
    head = checked_request((*POST, NeverIndexed(b"authorization", b" secret\t"), (b"k", b"\t a b ")))
    assert head.fields == (*POST, (b"authorization", b"secret"), (b"k", b"a b"))
    assert [isinstance(field, NeverIndexed) for field in head.fields[4:]] == [True, False]


@pytest.mark.parametrize(
    ("status", "informational"), [(b"100", True), (b"103", True), (b"200", False), (b"503", False)]
)
def test_an_answer_says_whether_another_follows(status: bytes, informational: bool) -> None:
    head: HeaderList = checked_response(((b":status", status), (b"k", b"v")))
    assert head.is_informational is informational


@pytest.mark.parametrize("status", [b"", b"20", b"2000", b"2x0", b"101", "²00".encode()])
def test_an_answer_has_a_status_of_three_digits_that_http2_knows(status: bytes) -> None:
    with pytest.raises(Malformed):
        checked_response(((b":status", status),))


@pytest.mark.parametrize("name", [b":status", b":path", b":x"])
def test_trailers_have_no_pseudo_header_fields(name: bytes) -> None:
    assert checked_trailers(((b"grpc-status", b"0"),)).fields == ((b"grpc-status", b"0"),)
    with pytest.raises(Malformed):
        checked_trailers(((b"grpc-status", b"0"), (name, b"200")))


@pytest.mark.parametrize(
    ("value", "may"),
    [
        (b"host:50051", True),
        (b"[::1]:1", True),
        (b"a%20b", True),
        (b"", True),
        (b"a b", False),
        (b"a/", False),
        (b"u@a", False),
    ],
)
def test_an_authority_has_the_characters_of_a_host(value: bytes, may: bool) -> None:
    assert is_authority(value) is may
