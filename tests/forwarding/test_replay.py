"""A large request: an attempt gets all of it, whenever its rest arrives and however often it is sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_call import Asking
from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.replay import LargeRequest
from gateway.rpc.client import ClientCall
from gateway.rpc.deadlines import Deadlines
from gateway.types import Variant
from gateway.upstream.endpoint import Endpoint
from gateway.upstream.placed import Placed
from gateway.upstream.region import Region
from gateway.upstream.room import SharedMemorySettings
from gateway.upstream.shared_memory import SharedMemory
from gateway.v2.peek import Head, peek_front
from gateway.v2.placing import read_front

VARIANT = Variant("a", "u", "net", "2")
TENSOR = bytes(1000)
WHOLE = pb.ModelInferRequest(model_name="m", inputs=[{"name": "x"}], raw_input_contents=[TENSOR]).SerializeToString()
FRONT = 40


class Large(Asking):
    """Passes on, keeps and collects what arrives of a request."""

    def __init__(self, keeps: bool = True) -> None:
        super().__init__("")
        self.arrived = FRONT
        self.keeps = keeps
        self.upstream: ClientCall | None = None
        self.ending = self.copy = b""
        self.collects = False
        self.kept = 0
        self.placed: Any = None

    @property
    def missing(self) -> int:
        return len(WHOLE) - self.arrived

    def arrive(self, size: int) -> None:
        data = WHOLE[self.arrived : self.arrived + size]
        self.arrived += len(data)
        if self.upstream is not None:
            self.copy += data
            self.upstream.request += data
            if not self.missing:
                self.upstream.request += self.ending

    def collect_request(self) -> None:
        self.collects = True

    def request_so_far(self) -> bytes:
        assert self.collects
        return WHOLE[: self.arrived]

    def pass_request(self, upstream: ClientCall, ending: bytes) -> None:
        self.upstream, self.ending = upstream, ending

    def lay_request(self, take: Any, whole: Any) -> None:
        self.placed = take
        take.feed(WHOLE[self.arrived :])
        self.arrived = len(WHOLE)
        whole()

    def may_keep(self) -> bool:
        return self.keeps

    def keep_request(self, size: int) -> None:
        self.kept += size

    def maybe_take_back(self) -> bytes | None:
        if not self.keeps:
            return None
        copy, self.copy = self.copy, b""
        return copy


def head() -> Head:
    found = peek_front(WHOLE[:FRONT])
    assert found is not None  # its end is that of the front
    return found


def attempt(request: LargeRequest) -> tuple[ClientCall, bool]:
    client = ClientCall(b"/", (), Deadlines(), None, 0.0)
    return client, request.put_into(client, VARIANT, head(), None)


def is_whole(client: ClientCall) -> bool:
    got: Any = pb.ModelInferRequest.FromString(bytes(client.request))
    return (got.model_name, got.model_version, got.raw_input_contents[0]) == ("net", "2", TENSOR)


def test_the_rest_follows_as_it_comes() -> None:
    caller = Large()
    client, follows = attempt(LargeRequest(caller, WHOLE[:FRONT]))
    assert follows
    assert client.request_more == caller.missing + len(caller.ending)
    caller.arrive(10_000)
    assert is_whole(client)


def test_it_is_sent_again_with_what_has_come_meanwhile_as_often_as_it_must_be() -> None:
    caller = Large()
    request = LargeRequest(caller, WHOLE[:FRONT])
    for _ in range(3):
        client, follows = attempt(request)
        caller.arrive(200)
        assert follows
        assert request.can_be_resent()
    caller.arrive(10_000)
    assert is_whole(client)
    assert request.can_be_resent()
    client, follows = attempt(request)
    assert not follows
    assert is_whole(client)


def test_it_cannot_be_sent_again_once_its_caller_keeps_nothing() -> None:
    request = LargeRequest(Large(keeps=False), WHOLE[:FRONT])
    attempt(request)
    assert not request.can_be_resent()


def test_what_arrives_while_the_call_waits_for_its_first_attempt_is_collected() -> None:
    caller = Large()
    request = LargeRequest(caller, WHOLE[:FRONT])
    request.hold()
    caller.arrive(500)
    request.resume()
    client, follows = attempt(request)
    caller.arrive(10_000)
    assert follows
    assert is_whole(client)


def test_what_arrives_while_the_call_waits_for_another_attempt_is_passed_on_and_kept() -> None:
    caller = Large()
    request = LargeRequest(caller, WHOLE[:FRONT])
    attempt(request)
    request.hold()
    caller.arrive(500)
    request.resume()
    client, _ = attempt(request)
    caller.arrive(10_000)
    assert not caller.collects
    assert is_whole(client)


@pytest.fixture
def placed(tmp_path: Path) -> Iterator[Placed]:
    """A place in memory that no Triton knows of."""
    region, parts = Region(tmp_path, 1 << 20), read_front(WHOLE[:FRONT])
    assert parts is not None
    slot = region.slots.maybe_take(parts.size_of(len(WHOLE)))
    assert slot is not None
    no_connection: Any = None
    shared = SharedMemory(Endpoint("main", "127.0.0.1:1", no_connection), SharedMemorySettings(1 << 20, 1, tmp_path))
    yield Placed(shared, region, slot, parts)
    slot.drop()
    region.close()


@pytest.mark.parametrize("keeps", [True, False])
def test_what_was_laid_into_memory_is_sent_again_if_there_is_room_for_a_copy(keeps: bool, placed: Placed) -> None:
    """It was nobody's message while it lay there: taken back, it takes as much memory as any copy."""
    caller = Large(keeps)
    request = LargeRequest(caller, WHOLE[:FRONT])
    request.place(placed, lambda: None)
    assert caller.kept == 0
    assert request.can_be_resent() == keeps
    assert caller.kept == (len(WHOLE) - placed.raw_at if keeps else 0)
    if keeps:
        client, follows = attempt(request)
        assert not follows
        assert is_whole(client)
        assert request.can_be_resent()


def test_what_was_laid_in_vain_is_counted_though_there_is_no_room(placed: Placed) -> None:
    """It has not been tried yet, so it must be sent."""
    caller = Large(keeps=False)
    request = LargeRequest(caller, WHOLE[:FRONT])
    request.place(placed, lambda: None)
    request.take_back()
    assert caller.kept == len(WHOLE) - placed.raw_at
    assert is_whole(attempt(request)[0])
