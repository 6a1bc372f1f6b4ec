"""Between a servicer's context and the core: how long a call has, who is this machine, and how an error leaves."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from gateway.api.calls import CallLimits, is_loopback, request_from, with_errors
from gateway.errors import BUG_TEXT, NoTarget, UnknownModel

LIMITS = CallLimits(default_deadline=30, longest_deadline=60)


@pytest.mark.parametrize(
    ("limits", "given", "gets"),
    [
        (CallLimits(), None, None),
        (CallLimits(), 5, 5),
        (LIMITS, None, 30),
        (LIMITS, 5, 5),
        (LIMITS, 3600, 60),
        (LIMITS, 0, 0),  # over already; not "none given"
        (CallLimits(longest_deadline=60), None, 60),
        (CallLimits(default_deadline=30), 3600, 3600),
        (CallLimits(default_deadline=90, longest_deadline=60), None, 60),
    ],
)
def test_a_call_has_the_time_that_its_caller_gives_within_limits(
    limits: CallLimits, given: float | None, gets: float | None
) -> None:
    assert limits.apply(given) == gets


@pytest.mark.parametrize(
    ("peer", "is_here"),
    [
        ("ipv4:127.0.0.1:50000", True),
        ("ipv4:127.8.9.1:1", True),
        ("ipv6:%5B::1%5D:50000", True),
        ("ipv6:[::1]:50000", True),
        ("ipv6:%5B::ffff:127.0.0.1%5D:50000", True),  # of a socket for both
        ("unix:/run/gateway.sock", True),
        ("unix:", True),
        ("ipv4:10.0.0.9:50000", False),
        ("ipv6:%5B::ffff:10.0.0.9%5D:50000", False),
        ("ipv6:%5B2001:db8::1%5D:50000", False),
        ("ipv4:0.0.0.0:1", False),
        ("ipv4:localhost:1", False),  # a name is no proof
        ("", False),
        ("ipv4:", False),
        ("nonsense", False),
    ],
)
def test_only_this_machine_s_addresses_are_loopback(peer: str, is_here: bool) -> None:
    assert is_loopback(peer) is is_here


class Aborted(Exception):
    """What ends a handler whose context was aborted."""


@dataclass
class Context:
    """A servicer context, as far as handlers use it."""

    metadata: Any = ()
    remaining: float | None = None
    ended: list[Any] = field(default_factory=list)

    def invocation_metadata(self) -> Any:
        return self.metadata

    def time_remaining(self) -> float | None:
        return self.remaining

    def peer(self) -> str:
        return "ipv4:10.0.0.9:5"

    async def abort(self, code: grpc.StatusCode, text: str, trailing_metadata: Any = ()) -> None:
        self.ended.append((code, text, dict(trailing_metadata)))
        raise Aborted


def test_a_request_has_its_deadline_from_the_call_or_the_limits() -> None:
    request = request_from(Context((("k", "v"),), 50.0), b"body", "ModelInfer", LIMITS)
    assert (request.body, request.peer, request.method) == (b"body", "ipv4:10.0.0.9:5", "ModelInfer")
    assert request.metadata.values == {"k": "v"}
    assert request.deadline is not None
    assert 20 < request.deadline.remaining(time.monotonic()) <= 50
    assert request_from(Context(None), b"", "ModelInfer", CallLimits()).deadline is None


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (UnknownModel("x"), grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'x' is not found"),
        (NoTarget("nobody"), grpc.StatusCode.UNAVAILABLE, "nobody"),
        (ValueError("secret"), grpc.StatusCode.INTERNAL, BUG_TEXT),
    ],
)
async def test_an_error_ends_the_call_once_with_its_status_and_the_caller_s_id(
    raised: Exception, code: grpc.StatusCode, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Any, context: Any) -> None:
        raise raised

    context = Context((("x-request-id", "r-1"),))
    with caplog.at_level(logging.ERROR), pytest.raises(Aborted):
        await with_errors(handler)(None, context)
    [(got, said, trailing)] = context.ended
    assert (got, said) == (code, text)
    assert trailing["x-request-id"] == "r-1"
    assert bool(caplog.records) is isinstance(raised, ValueError)


async def test_a_call_that_was_aborted_is_not_ended_again() -> None:
    async def handler(request: Any, context: Any) -> None:
        raise grpc.aio.AbortError("Locally aborted.")

    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        await with_errors(handler)(None, context)
    assert context.ended == []


async def test_an_answer_comes_through() -> None:
    async def handler(request: int, context: Any) -> int:
        return request + 1

    assert await with_errors(handler)(1, Context()) == 2
