"""How overload says when to try again, as Google's own message classes read it."""

from __future__ import annotations

import pytest
from google.rpc import error_details_pb2, status_pb2

from gateway.errors import Overloaded
from gateway.forwarding.metadata import failed_trailers
from gateway.forwarding.retry_info import pushback_fields


@pytest.mark.parametrize(
    ("seconds", "whole", "nanos", "pushback"),
    [(0.05, 0, 50_000_000, b"50"), (1.0, 1, 0, b"1000"), (2.5, 2, 500_000_000, b"2500")],
)
def test_an_overload_says_in_its_trailers_when_to_try_again(
    seconds: float, whole: int, nanos: int, pushback: bytes
) -> None:
    trailers = dict(failed_trailers(Overloaded("there is no room", seconds)))
    assert pushback_fields(Overloaded("", seconds)) == ((b"grpc-retry-pushback-ms", pushback),)
    details = trailers["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    status = status_pb2.Status.FromString(details)
    assert (status.code, status.message) == (8, "there is no room")
    info = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert (info.retry_delay.seconds, info.retry_delay.nanos) == (whole, nanos)
