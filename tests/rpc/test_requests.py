"""Heads of requests are read once, and what callers choose is kept within bounds."""

from __future__ import annotations

import pytest

from gateway.http2.hpack import Field
from gateway.http2.limits import Limits
from gateway.rpc.codes import CallFailed
from gateway.rpc.requests import KEPT, KEPT_BYTES, RequestHeads
from gateway.status import Code

USUAL: tuple[Field, ...] = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/s/M"),
    (b":authority", b"a:1"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
)


def headers(*more: Field) -> tuple[Field, ...]:
    return tuple((bytes(bytearray(name)), bytes(bytearray(value))) for name, value in (*USUAL, *more))


def test_equal_header_lists_share_one_head() -> None:
    heads = RequestHeads(Limits())
    first = heads.read(headers((b"x-a", b"1"), (b"grpc-timeout", b"2S")))
    assert (first.path, list(first.fields), first.timeout) == (b"/s/M", [(b"x-a", b"1")], 2.0)
    assert heads.read(headers((b"x-a", b"1"), (b"grpc-timeout", b"2S"))) is first
    assert heads.read(headers((b"x-a", b"2"), (b"grpc-timeout", b"2S"))) is not first


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ((b"grpc-timeout", b"soon"), Code.INTERNAL),
        ((b"grpc-timeout", b"0n"), Code.DEADLINE_EXCEEDED),
        ((b"x-a", b"\x01"), Code.INTERNAL),
    ],
    ids=["no timeout", "no time", "control character"],
)
def test_a_head_that_can_t_be_served_is_refused_every_time(more: Field, code: Code) -> None:
    heads = RequestHeads(Limits())
    for _ in range(2):
        with pytest.raises(CallFailed) as failed:
            heads.read(headers(more))
        assert failed.value.code is code
    assert len(heads) == 0


def test_only_so_many_are_kept_and_no_large_one() -> None:
    heads = RequestHeads(Limits())
    for number in range(3 * KEPT):
        heads.read(headers((b"x-n", b"%d" % number)))
        assert len(heads) <= KEPT
    before = len(heads)
    heads.read(headers((b"x-large", b"l" * KEPT_BYTES)))
    assert len(heads) == before
