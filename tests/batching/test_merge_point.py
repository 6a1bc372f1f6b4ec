"""What goes wrong with one member of a merged request ends that one, and leaves no other without an answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as pb

from gateway.forwarding.attempts import Attempt
from gateway.forwarding.batching import Batch, Layout, MergeSettings
from gateway.forwarding.batching.merge_point import MergePoint, maybe_merge_point
from gateway.rpc.client import ClientCall
from gateway.rpc.deadlines import Deadlines
from gateway.rpc.metadata import Fields
from gateway.status import Code
from gateway.types import Metadata, Variant
from gateway.upstream.connection import Answer
from gateway.upstream.endpoint import Endpoint
from gateway.v2.peek import Head, peek_request

BROKEN = "this member is broken"
BAD = 99  # a row that the model refuses


class Server:
    """A Triton with one model, whose calls a test answers by hand; its channel and its connection in one."""

    def __init__(self) -> None:
        self.calls: list[ClientCall] = []
        self.refuses: set[bytes] = set()  # paths whose calls can't even be submitted

    async def unary(self, path: str, body: bytes, metadata: Metadata, timeout: float | None) -> Answer:
        answer: Any = pb.ModelStatisticsResponse()
        if path.endswith("ModelConfig"):
            answer = self.config()
        elif path.endswith("ModelMetadata"):
            answer = pb.ModelMetadataResponse(name="net", versions=["1"])
            answer.outputs.add(name="OUT", datatype="UINT8", shape=[-1, 1])
        return Answer(answer.SerializeToString(), (), ())

    @staticmethod
    def config() -> pb.ModelConfigResponse:
        answer = pb.ModelConfigResponse()
        answer.config.max_batch_size = 8
        return answer

    def call(self, path: bytes, fields: Fields = (), deadline: float | None = None) -> ClientCall:
        return ClientCall(path, fields, Deadlines(), None, 0.0)

    def submit(self, call: ClientCall) -> None:
        if call.path in self.refuses:
            raise RuntimeError("no")
        self.calls.append(call)

    def answer(self) -> None:
        """Answer all that has come: each request with its own rows."""
        calls, self.calls = self.calls, []
        for call in calls:
            if call.on_done is None:
                continue  # cancelled
            call.code = Code.OK
            if call.path.endswith(b"ModelInfer"):
                call.body = echo(call.request or b"")
                call.code = Code.OK if call.body else Code.INVALID_ARGUMENT
            else:
                call.body = self.config().SerializeToString()
            call.on_done(call)


def echo(body: bytes) -> bytes:
    """b"" where a row is bad."""
    asked = pb.ModelInferRequest.FromString(body)
    if BAD in asked.raw_input_contents[0]:
        return b""
    answer = pb.ModelInferResponse(model_name="net", model_version="1")
    answer.outputs.add(name="OUT", datatype="UINT8", shape=asked.inputs[0].shape)
    answer.raw_output_contents.extend(asked.raw_input_contents)
    return answer.SerializeToString()


class Caller:
    """A member. breaks: the methods in which it throws."""

    layout: Layout
    source: bytes | memoryview
    spans: Sequence[tuple[int, int]]
    carried: Fields
    batch: Batch[Any] | None = None
    passed: Fields = ()
    added: Metadata = ()
    upstream_id: str | None = None
    context: Fields = ()
    is_over = False

    def __init__(self, server: Server, number: int, *breaks: str) -> None:
        message = pb.ModelInferRequest(model_name="net")
        message.inputs.add(name="IN", datatype="UINT8", shape=[1, 1])
        message.raw_input_contents.append(bytes((number,)))
        self.body = message.SerializeToString()
        self.head = peek_request(self.body)
        self.caller: Hashable = number
        self.blamed: Hashable = number
        self.number = number
        self.got: list[object] = []
        self._server = server
        self._breaks = breaks
        self.point: MergePoint | None = None

    def left_in_batch(self, requests: int, carrier: Metadata) -> None: ...

    def send_alone(self, ended: Callable[[bool], None]) -> None:
        self._may_break("send_alone")
        call = self._server.call(b"/inference.GRPCInferenceService/ModelInfer")
        call.request = self.body

        def done(client: ClientCall) -> None:
            ended(client.code is not Code.OK)
            assert self.point is not None
            if client.code is not Code.OK:
                self._end(client.code)
                return
            head = Head("net", "1", "", True, [], 0, 0, None, [])
            self.point.learn(self, client.body, head)
            self._end(bytes((client.body[-1],)))

        call.on_done = done
        self._server.submit(call)

    def answered(self, body: bytes, head: Head, client: ClientCall, members: int) -> None:
        self._may_break("answered")
        self._end(pb.ModelInferResponse.FromString(body).raw_output_contents[0])

    def failed(self, client: ClientCall) -> None:
        self._may_break("failed")
        self._end("failed")

    def broken(self) -> None:
        self._end(BROKEN)

    def _may_break(self, method: str) -> None:
        if method in self._breaks:
            raise RuntimeError(method)

    def _end(self, how: object) -> None:
        self.is_over = True
        self.got.append(how)


async def point_of(server: Any) -> MergePoint:
    """One that has learnt of its model."""
    endpoint = Endpoint("u", "t:1", server)
    attempt = Attempt(Variant("only", "u", "net"), endpoint, 1, "only", "")
    point = maybe_merge_point("m", attempt, MergeSettings(), "")
    assert point is not None
    assert not point.takes(Caller(server, 0))
    await asyncio.sleep(0.01)
    return point


def submit(point: MergePoint, *members: Caller) -> None:
    for member in members:
        member.point = point
        assert point.takes(member)
        point.submit(member)


async def run(server: Server) -> None:
    for _ in range(40):
        await asyncio.sleep(0)
        server.answer()


BREAKING = [("answered",), ("send_alone",), ("failed", "answered")]


@pytest.mark.parametrize("breaks", BREAKING, ids="-".join)
async def test_a_member_that_throws_leaves_the_others_their_answers(
    breaks: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    point = await point_of(server)
    first, *members = (Caller(server, n, *(breaks if n == 2 else ())) for n in range(4))
    with caplog.at_level(logging.ERROR):
        submit(point, first, *members)
        await run(server)
    assert [member.got for member in (first, members[0], members[2])] == [[b"\0"], [b"\1"], [b"\3"]]
    assert members[1].got == ([BROKEN] if "answered" in breaks else [b"\2"])
    assert len([record for record in caplog.records if record.exc_info]) == ("answered" in breaks)
    again = Caller(server, 7)
    submit(point, again)  # nothing counts as in flight any more
    await run(server)
    assert again.got == [b"\7"]


async def test_a_lonely_member_that_throws_holds_nobody_up() -> None:
    server = Server()
    point = await point_of(server)
    bad, good = Caller(server, 1, "send_alone"), Caller(server, 2)
    submit(point, bad, good)
    await run(server)
    assert bad.got == [BROKEN]
    assert good.got == [b"\2"]


async def test_a_merged_request_that_can_not_be_sent_ends_its_members_and_holds_nobody_up() -> None:
    server = Server()
    point = await point_of(server)
    members = [Caller(server, n) for n in range(3)]
    submit(point, *members)
    server.refuses.add(b"/inference.GRPCInferenceService/ModelConfig")  # the look at its side
    await run(server)
    assert [member.got for member in members] == [[b"\0"], [BROKEN], [BROKEN]]
    server.refuses.clear()
    again = Caller(server, 7)
    submit(point, again)
    await run(server)
    assert again.got == [b"\7"]


async def test_when_the_look_at_its_side_shows_another_model_a_merged_answer_is_thrown_away() -> None:
    server = Server()
    point = await point_of(server)
    members = [Caller(server, n) for n in range(4)]
    submit(point, *members)
    server.config = pb.ModelConfigResponse  # type: ignore[method-assign]  # loaded anew without batching
    merged: list[int] = []
    for _ in range(40):
        await asyncio.sleep(0)
        merged += [len(call.request or b"") for call in server.calls if call.path.endswith(b"ModelInfer")]
        server.answer()
    assert [member.got for member in members] == [[b"\0"], [b"\1"], [b"\2"], [b"\3"]]
    assert len(merged) == 1 + 1 + 3  # the first alone, the batch, and its members once more
    assert not point.takes(Caller(server, 9))


@pytest.mark.parametrize("blamed", ["eve", None], ids=["a name", "a connection each"])
async def test_who_has_spoilt_three_batches_is_sent_alone_by_whatever_connection_he_comes(blamed: str | None) -> None:
    server = Server()
    point = await point_of(server)
    for number in range(3):
        first, good, bad = Caller(server, 0), Caller(server, 1), Caller(server, BAD)
        bad.caller = 100 + number
        bad.blamed = blamed or bad.caller
        submit(point, first, good, bad)
        await run(server)
        assert [member.got for member in (first, good, bad)] == [[b"\0"], [b"\1"], [Code.INVALID_ARGUMENT]]
    another = Caller(server, BAD)
    another.caller = 103
    another.blamed = blamed or another.caller
    assert point.takes(another) is (blamed is None)
    assert point.takes(Caller(server, 1))
