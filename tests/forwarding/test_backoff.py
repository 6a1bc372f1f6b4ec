"""How long an attempt waits."""

from __future__ import annotations

import pytest

from gateway.forwarding.backoff import FIRST_SECONDS, MOST_SECONDS, pushback, wait_before


def test_the_second_attempt_waits_for_nothing_and_later_ones_up_to_a_bound_that_doubles() -> None:
    assert [wait_before(number, 0.999) for number in (1, 2)] == [0.0, 0.0]
    assert [wait_before(number, 0.5) for number in (3, 4, 5)] == [FIRST_SECONDS * share for share in (0.5, 1.0, 2.0)]
    assert wait_before(99, 1.0) == MOST_SECONDS
    assert wait_before(4, 0.0) == 0.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"300", 0.3),
        (b"0", 0.0),
        (b"60000", 60.0),
        (b"60001", -1.0),
        (b"999999999", -1.0),
        (b"9" * 30, -1.0),
        (b"-1", -1.0),
        (b"soon", -1.0),
        (b"", -1.0),
    ],
)
def test_what_a_server_wants(value: bytes, seconds: float) -> None:
    """What is no number means never, as gRFC A6 says; what is too long as well, since a call may have no deadline."""
    assert pushback(((b"x", b"1"), (b"grpc-retry-pushback-ms", value))) == seconds


def test_a_server_that_says_nothing() -> None:
    assert pushback(((b"x", b"1"),)) is None
