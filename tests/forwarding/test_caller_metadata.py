"""Which metadata passes, and what routing sees of it."""

from __future__ import annotations

import pytest

from gateway.forwarding.metadata import echoed, first_values, passed_on, served_trailers
from gateway.types import Served

PASSED = ["authorization", "x-user-id", "x-anything-bin", "grpc-status-details-bin", "triton_grpc_error", "baggage"]
HELD = [
    *("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
    *("host", "content-type", "content-length", "user-agent", ":authority"),
    *("grpc-timeout", "grpc-encoding", "grpc-accept-encoding", "grpc-trace-bin"),
    *("gateway-variant", "gateway-upstream", "traceparent", "tracestate"),
]


@pytest.mark.parametrize("key", PASSED)
def test_applications_metadata_passes(key: str) -> None:
    assert passed_on([(key, "v")]) == [(key, "v")]


@pytest.mark.parametrize("key", HELD)
def test_hop_by_hop_and_reserved_metadata_ends_here(key: str) -> None:
    assert passed_on([(key, "v")]) == []


def test_order_and_repetitions_are_kept() -> None:
    metadata = [("b", "1"), ("te", "trailers"), ("a", "2"), ("b", "3"), ("k-bin", b"\xff")]
    assert passed_on(metadata) == [("b", "1"), ("a", "2"), ("b", "3"), ("k-bin", b"\xff")]


def test_routing_sees_the_first_text_of_each_key_trimmed() -> None:
    metadata = [("x", "  one "), ("x", "two"), ("y-bin", b"\x00"), ("z", "")]
    assert first_values(metadata) == {"x": "one", "z": ""}


def test_trailers_name_who_answered_and_do_not_pass_a_second_gateway() -> None:
    trailers = served_trailers(Served("m", "gpu", "3", "a:1", 2))
    assert dict(trailers) == {
        "gateway-variant": "gpu",
        "gateway-model-version": "3",
        "gateway-endpoint": "a:1",
        "gateway-attempts": "2",
    }
    assert passed_on(trailers) == []


@pytest.mark.parametrize(
    ("id", "is_echoed"),
    [
        ("abc-1", True),
        ("a" * 256, True),
        ("", False),
        ("a" * 257, False),
        ("\xff", False),
        ("a\tb", False),
    ],
    ids=["id", "longest", "empty", "too long", "not ASCII", "control character"],
)
def test_a_sensible_request_id_is_echoed(id: str, is_echoed: bool) -> None:
    assert echoed({"x-request-id": id}) == ((("x-request-id", id),) if is_echoed else ())


def test_nothing_else_is_echoed() -> None:
    assert echoed({"authorization": "secret", "x-request": "a"}) == ()
