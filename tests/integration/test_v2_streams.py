"""ModelStreamInfer through the gateway, compared with Triton's own where that is possible."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import wait_until
from tritonclient.grpc import service_pb2 as pb
from v2_calls import call, channel_to, infer, numbers, read_all, stream, stream_all
from v2_gateways import Script, endpoint_of, gateway_of, in_front_of

from gateway.app import Gateway
from gateway.config import load
from gateway.forwarding.streams import StreamLimits
from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

OPT_IN = {"triton_enable_empty_final_response": True}


@pytest.fixture(scope="module")
async def channel(gateway: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    async with channel_to(gateway.listen) as made:
        yield made


@pytest.fixture(scope="module")
async def direct(triton: LocalTriton) -> AsyncIterator[grpc.aio.Channel]:
    async with channel_to(triton.grpc_address) as made:
        yield made


def repeat(model: str, times: int, *, delay: int = 0, id: str = "", **parameters: Any) -> Any:
    """A request for so many answers, with milliseconds before each."""
    request = infer(model, [times], "INT32", id=id, parameters=parameters)
    request.inputs.add(name="DELAY", datatype="INT32", shape=[1])
    request.raw_input_contents.append(np.int32(delay).tobytes())
    return request


def failing(text: str, id: str = "") -> Any:
    return infer("fails", [text.encode()], "BYTES", id=id)


async def test_each_message_is_routed_on_its_own(channel: grpc.aio.Channel) -> None:
    """Two variants, two endpoints, a model's own name and a pipeline on one stream."""
    streaming = stream(channel)
    requests = [
        infer("adder", [[1.0]], id="1"),
        infer("far-adder", [[1.0]], id="2"),
        infer("add_two", [[1.0]], id="3"),
        infer("best-label", [[0, 9, 3, 1]], id="4", name="scores"),
    ] * 5
    for request in requests:
        await streaming.write(request)
    await streaming.done_writing()
    answers = await read_all(streaming)
    assert [answer.error_message for answer in answers] == [""] * 20
    assert [a.infer_response.id for a in answers] == ["1", "2", "3", "4"] * 5
    names = ["adder", "far-adder", "add_two", "best-label"]
    assert [a.infer_response.model_name for a in answers] == names * 5
    assert [numbers(a.infer_response) for a in answers[:3]] == [[2.0], [3.0], [3.0]]
    assert answers[3].infer_response.raw_output_contents[0][4:] == b"1"
    trailers = dict(await streaming.trailing_metadata())
    assert set(trailers["gateway-variant"].split(",")) >= {"only", "add_two"}
    assert len(trailers["gateway-endpoint"].split(",")) == 2


@pytest.mark.parametrize("parameters", [{}, OPT_IN], ids=["plain", "with empty final"])
async def test_a_pipelines_answer_says_that_it_is_the_last_as_a_models_does(
    channel: grpc.aio.Channel, direct: grpc.aio.Channel, parameters: dict[str, Any]
) -> None:
    [model] = await stream_all(direct, [infer("add_two", [[1.0]], parameters=parameters)])
    asked = infer("best-label", [[0, 9, 3, 1]], name="scores", parameters=parameters)
    [pipeline] = await stream_all(channel, [asked])
    assert model.infer_response.parameters["triton_final_response"].bool_param
    assert pipeline.infer_response.parameters == model.infer_response.parameters
    assert pipeline.infer_response.raw_output_contents[0][4:] == b"1"
    assert not (await call(channel, asked)).response.parameters


@pytest.mark.parametrize("opted", [False, True], ids=["plain", "with empty final"])
@pytest.mark.parametrize("times", [0, 1, 3])
async def test_decoupled_answers_are_tritons(
    channel: grpc.aio.Channel, direct: grpc.aio.Channel, times: int, opted: bool
) -> None:
    parameters = OPT_IN if opted else {}
    expected = await stream_all(direct, [repeat("repeat", times, id="x", **parameters)])
    through = await stream_all(channel, [repeat("repeat", times, id="x", **parameters)])
    assert [values(answer) for answer in through] == [values(answer) for answer in expected]
    public = await stream_all(channel, [repeat("counter", times, id="x", **parameters)])
    assert [values(answer) for answer in public] == [values(answer) for answer in expected]
    assert {answer.infer_response.model_name for answer in public} <= {"counter"}
    if opted:
        assert through == expected


async def test_a_decoupled_answer_may_go_on_after_an_error(channel: grpc.aio.Channel, direct: grpc.aio.Channel) -> None:
    request = infer("repeat", [4], "INT32", id="x", parameters=OPT_IN)
    request.inputs.add(name="FAIL_AT", datatype="INT32", shape=[1])
    request.raw_input_contents.append(np.int32(1).tobytes())
    expected = await stream_all(direct, [request])
    assert [bool(answer.error_message) for answer in expected] == [False, True, False, False, False]
    assert await stream_all(channel, [request]) == expected


def values(answer: Any) -> Any:
    response = answer.infer_response
    return answer.error_message, response.id, tuple(response.raw_output_contents), final_flag(response)


def final_flag(response: Any) -> bool:
    """Whether a response says that it is the last; one that does not say is not."""
    return bool(response.parameters["triton_final_response"].bool_param)


async def test_decoupled_requests_overlap_and_each_keeps_its_order(channel: grpc.aio.Channel) -> None:
    where = ["here", "there"]
    requests = [repeat("counter", 5, delay=100, id=str(i), where=where[i % 2]) for i in range(6)]
    answers = await stream_all(channel, requests)
    ids = [a.infer_response.id for a in answers if len(a.infer_response.outputs)]
    assert ids != sorted(ids, key=ids.index)  # one after the other they would be in a row each
    for id in map(str, range(6)):
        assert [numbers(a.infer_response)[0] for a in answers if a.infer_response.id == id] == [0, 1, 2, 3, 4]


async def test_a_slow_decoupled_request_does_not_hold_up_others(channel: grpc.aio.Channel) -> None:
    await stream_all(channel, [repeat("counter", 1)])  # what kind of model it is shows in its first answer
    answers = await stream_all(channel, [repeat("counter", 1, delay=200, id="slow"), infer("adder", id="quick")])
    assert [answer.infer_response.id for answer in answers] == ["quick", "slow"]


async def test_answers_of_other_models_keep_the_order_of_their_requests(channel: grpc.aio.Channel) -> None:
    """Over two endpoints, of which the first is the slower one."""
    slow = infer("far-waiter", [[150]], "INT32", id="slow")
    answers = await stream_all(channel, [slow, infer("adder", id="1"), infer("adder", id="2")])
    assert [answer.infer_response.id for answer in answers] == ["slow", "1", "2"]


@st.composite
def mixed(draw: st.DrawFn) -> list[Any]:
    """Requests for one stream: answered once, n times, or with an error; every id is used once, one may be empty."""
    kinds = draw(st.lists(st.sampled_from(["once", "repeat", "dtype", "unknown", "fails"]), max_size=10))
    requests = []
    for number, kind in enumerate(kinds):
        id = str(number)
        if kind == "repeat":
            parameters = OPT_IN if draw(st.booleans()) else {}
            requests.append(repeat("repeat", draw(st.integers(0, 4)), id=id, **parameters))
        elif kind == "fails":
            requests.append(failing(f"broken {number}", id))
        else:
            model, datatype = ("nobody" if kind == "unknown" else "add_two"), ("INT32" if kind == "dtype" else "FP32")
            requests.append(infer(model, [[number]], datatype, id=id))
    return requests


@settings(max_examples=60, deadline=None)
@given(mixed())
async def test_any_mix_of_requests_gets_tritons_own_answers(
    channel: grpc.aio.Channel, direct: grpc.aio.Channel, requests: list[Any]
) -> None:
    """In order per request, and over those that are answered once.

    Triton itself gets a stream for each, since it does not survive decoupled models and others on one.
    """
    counted = {request.id for request in requests if request.model_name == "repeat"}
    expected = [answer for request in requests for answer in await stream_all(direct, [request])]
    through = await stream_all(channel, requests)
    for id in counted:
        assert of(through, {id}) == of(expected, {id})
    others = {request.id for request in requests} - counted
    assert of(through, others) == of(expected, others)


def of(answers: list[Any], ids: set[str]) -> list[Any]:
    return [values(answer) for answer in answers if answer.infer_response.id in ids]


WRONG = {
    "unknown model": infer("nobody", id="w"),
    "unknown version": infer("add_two", version="9", id="w"),
    "version that is no number": infer("add_two", version="x", id="w"),
    "wrong dtype": infer("add_two", [[1]], "INT32", id="w"),
    "wrong input": infer("add_two", id="w", name="NONE"),
    "reserved parameter": infer("add_two", id="w", parameters={"triton_own": 1}),
    "model's own error": failing("it broke", "w"),
    "without id": failing("it broke"),
    "sequence not started": infer("accumulate", [[1]], "INT32", id="w", parameters={"sequence_id": 876}),
}


@pytest.mark.parametrize("request_", WRONG.values(), ids=WRONG)
async def test_errors_come_in_band_as_tritons_and_the_stream_goes_on(
    channel: grpc.aio.Channel, direct: grpc.aio.Channel, request_: Any
) -> None:
    requests = [infer("add_two", id="before"), request_, infer("add_two", id="after")]
    expected = await stream_all(direct, requests)
    through = await stream_all(channel, requests)
    assert [a.error_message for a in through] == [a.error_message for a in expected]
    assert [a.infer_response.id for a in through] == [a.infer_response.id for a in expected]
    assert through[1] == expected[1]


async def test_errors_of_public_models_name_them(channel: grpc.aio.Channel) -> None:
    answers = await stream_all(channel, [infer("failing", [b"broken"], "BYTES", id="f"), infer("adder", id="next")])
    assert (answers[0].error_message, answers[0].infer_response.id) == ("broken", "f")
    assert answers[1].infer_response.id == "next"


async def test_a_stream_that_asks_for_it_ends_with_the_first_error(
    channel: grpc.aio.Channel, direct: grpc.aio.Channel
) -> None:
    ends = []
    for way in (direct, channel):
        streaming = stream(way, [("triton_grpc_error", "true")])
        await streaming.write(failing("it broke", "w"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await streaming.read()
        ends.append((caught.value.code(), caught.value.details()))
    assert ends[0] == ends[1]


async def test_requests_may_share_an_id(channel: grpc.aio.Channel) -> None:
    answers = await stream_all(channel, [infer("adder", [[float(number)]], id="same") for number in range(20)])
    assert [numbers(answer.infer_response)[0] for answer in answers] == [number + 1 for number in range(20)]
    assert {answer.infer_response.id for answer in answers} == {"same"}


async def test_a_stream_without_requests_ends_well(channel: grpc.aio.Channel) -> None:
    assert await stream_all(channel, []) == []


async def test_bytes_that_are_no_request_are_answered_in_their_turn_and_end_nothing(channel: grpc.aio.Channel) -> None:
    method = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    streaming = method(timeout=20)
    for body in (
        infer("adder", [[1.0]], id="1").SerializeToString(),
        b"\xff\xff",
        infer("adder", [[1.0]], id="9" * 5000).SerializeToString(),
        infer("best-label", [[0, 9, 3, 1]], id="4", name="scores").SerializeToString() + b"\x22\x03\x0a\x01\xff",
        infer("adder", [[2.0]], id="5").SerializeToString(),
    ):
        await streaming.write(body)
    await streaming.done_writing()
    answers = [pb.ModelStreamInferResponse.FromString(answer) async for answer in streaming]
    assert [answer.infer_response.id for answer in answers] == ["1", "", "", "4", "5"]
    assert [bool(answer.error_message) for answer in answers] == [False, True, True, True, False]
    assert await streaming.code() is grpc.StatusCode.OK


async def test_two_thousand_requests_may_be_sent_before_one_answer_is_read(channel: grpc.aio.Channel) -> None:
    streaming = stream(channel)
    for number in range(2000):
        await asyncio.wait_for(streaming.write(infer("adder", [[float(number)]], id=str(number))), 20)
    await streaming.done_writing()
    answers = await read_all(streaming)
    assert [answer.infer_response.id for answer in answers] == [str(number) for number in range(2000)]
    assert [numbers(answer.infer_response)[0] for answer in answers] == [number + 1 for number in range(2000)]


# The end of either side


async def test_any_number_of_models_may_be_named_on_one_stream(gateway: Gateway, channel: grpc.aio.Channel) -> None:
    requests = [infer(f"nobody-{number}", id=str(number)) for number in range(200)]
    answers = await stream_all(channel, [*requests, infer("adder", id="last")])
    assert [answer.infer_response.id for answer in answers] == [*map(str, range(200)), "last"]
    assert [bool(answer.error_message) for answer in answers] == [True] * 200 + [False]


async def test_a_cancelled_stream_leaves_nothing_in_flight(gateway: Gateway, channel: grpc.aio.Channel) -> None:
    endpoints = [endpoint_of(gateway, name) for name in ("main", "other")]
    streaming = stream(channel)
    for place in ("here", "there"):
        await streaming.write(repeat("counter", 1000, delay=20, where=place))
    await wait_until(lambda: all(endpoint.in_flight for endpoint in endpoints))
    streaming.cancel()
    await wait_until(lambda: not any(endpoint.in_flight for endpoint in endpoints))


async def test_a_streams_deadline_ends_it_here_and_upstream(gateway: Gateway, channel: grpc.aio.Channel) -> None:
    streaming = stream(channel, timeout=0.2)
    await streaming.write(repeat("counter", 1000, delay=20, where="there"))
    assert await streaming.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await wait_until(lambda: not endpoint_of(gateway, "other").in_flight)


async def test_calls_and_streams_cancelled_at_any_moment_leave_nothing(
    gateway: Gateway, channel: grpc.aio.Channel
) -> None:
    endpoints = [endpoint_of(gateway, name) for name in ("main", "other")]
    await stream_all(channel, [infer("adder"), infer("far-adder"), repeat("counter", 1)])

    def tasks() -> int:
        """Without the waits with a timeout of what runs in the background, which come and go."""
        return sum(getattr(task.get_coro(), "__qualname__", "compiled") != "Event.wait" for task in asyncio.all_tasks())

    before = tasks()

    async def unary() -> None:
        await call(channel, infer("adder"))

    async def streaming() -> None:
        requests = [infer("adder"), repeat("counter", 50, delay=1), infer("far-adder"), infer("best-label")]
        made = stream(channel)
        try:
            for request in requests * 3:
                await made.write(request)
            await made.done_writing()
            await read_all(made)
        finally:
            made.cancel()

    for step in range(60):
        made = asyncio.ensure_future(unary() if step % 2 else streaming())
        await asyncio.sleep(step % 12 / 1000)
        made.cancel()
        await asyncio.wait([made])
    await wait_until(lambda: not any(endpoint.in_flight for endpoint in endpoints))
    await wait_until(lambda: tasks() <= before)


async def test_one_callers_cancellations_are_not_felt_by_another(gateway: Gateway, channel: grpc.aio.Channel) -> None:
    """They share the connections to the servers."""
    steady = stream(channel)
    await steady.write(repeat("counter", 200, delay=10, where="here"))
    await steady.done_writing()
    for _ in range(2):
        async with channel_to(gateway.listen) as other:
            for _ in range(15):
                made = [stream(other) for _ in range(50)]
                for each in made:
                    with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # it was thrown out
                        await each.write(infer("nobody"))
                await asyncio.sleep(0.01)
                for each in made:
                    each.cancel()
    assert [numbers(answer.infer_response)[0] for answer in await read_all(steady)] == list(range(200))


async def test_a_cancellation_reaches_the_server() -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def hang(requests: AsyncIterator[bytes], context: Any) -> None:
        context.add_done_callback(lambda context: cancelled.set())
        async for _ in requests:
            begun.set()
        await asyncio.sleep(30)

    async with in_front_of(Script(stream=hang)) as channel:
        streaming = stream(channel)
        await streaming.write(infer("any"))
        await begun.wait()
        streaming.cancel()
        await asyncio.wait_for(cancelled.wait(), 60)


async def test_a_stream_that_the_server_ends_fails_what_was_on_it_and_goes_on() -> None:
    async def once(requests: AsyncIterator[bytes], context: Any) -> None:
        async for body in requests:
            request = pb.ModelInferRequest.FromString(body)
            response = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
            if request.parameters["end"].bool_param:
                await context.abort(grpc.StatusCode.INTERNAL, "ended by the server")
            response.parameters["triton_final_response"].bool_param = True
            response.outputs.add(name="OUT")
            await context.write(pb.ModelStreamInferResponse(infer_response=response).SerializeToString())

    async with in_front_of(Script(stream=once)) as channel:
        streaming = stream(channel)
        seen = []
        for request in (infer("any", id="1"), infer("any", id="2", parameters={"end": True}), infer("any", id="3")):
            await streaming.write(request)
            seen.append(await streaming.read())
        streaming.cancel()
    assert [answer.infer_response.id for answer in seen] == ["1", "2", "3"]
    assert [bool(answer.error_message) for answer in seen] == [False, True, False]


# Back-pressure

MESSAGE = 1 << 20
ANSWERS = 400


class Flood:
    """An endpoint whose one answer has ANSWERS parts of MESSAGE bytes, and that counts those it got rid of."""

    def __init__(self) -> None:
        self.sent = 0

    async def __call__(self, requests: AsyncIterator[bytes], context: Any) -> None:
        async for body in requests:
            request = pb.ModelInferRequest.FromString(body)
            response = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
            response.outputs.add(name="OUT", datatype="UINT8", shape=[MESSAGE])
            response.raw_output_contents.append(bytes(MESSAGE))
            part = pb.ModelStreamInferResponse(infer_response=response)
            for number in range(ANSWERS):
                response.parameters["triton_final_response"].bool_param = number == ANSWERS - 1
                part.infer_response.CopyFrom(response)
                await context.write(part.SerializeToString())
                self.sent += 1


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_a_slow_reader_holds_up_the_server_and_costs_no_memory() -> None:
    flood = Flood()
    async with in_front_of(Script(stream=flood)) as channel:
        streaming = stream(channel, timeout=60)
        await streaming.write(infer("any"))
        await streaming.read()
        await asyncio.sleep(0.3)
        before = resident_bytes()
        await asyncio.sleep(1.0)
        assert flood.sent < ANSWERS / 4
        assert resident_bytes() - before < 16 * MESSAGE
        await streaming.done_writing()
        assert len(await read_all(streaming)) == ANSWERS - 1


async def test_answers_that_wait_for_their_turn_are_bounded(tmp_path: Path) -> None:
    """The first request's endpoint is slow; the other one's large answers are left there meanwhile."""
    go, sent = asyncio.Event(), 0
    count = 2 * StreamLimits().bytes // MESSAGE

    async def once(requests: AsyncIterator[bytes], context: Any, body: bytes) -> None:
        nonlocal sent
        async for raw in requests:
            request = pb.ModelInferRequest.FromString(raw)
            response = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
            response.outputs.add(name="OUT", datatype="UINT8", shape=[len(body)])
            response.raw_output_contents.append(body)
            response.parameters["triton_final_response"].bool_param = True
            await context.write(pb.ModelStreamInferResponse(infer_response=response).SerializeToString())
            sent += 1

    async def slow(requests: AsyncIterator[bytes], context: Any) -> None:
        await go.wait()
        await once(requests, context, b"slow")

    async def large(requests: AsyncIterator[bytes], context: Any) -> None:
        await once(requests, context, bytes(MESSAGE))

    async with Script(stream=slow).serve() as first, Script(stream=large).serve() as second:
        file = tmp_path / "gateway.yaml"
        file.write_text(
            f"""
            listen: 127.0.0.1:0
            admin: {{listen: "127.0.0.1:0"}}
            upstreams: {{slow: {{endpoints: ["{first}"]}}, large: {{endpoints: ["{second}"]}}}}
            models:
              slow-one: {{variants: {{only: {{upstream: slow, model: m}}}}}}
              large-one: {{variants: {{only: {{upstream: large, model: m}}}}}}
            """
        )
        async with gateway_of(load(file, {})) as gateway, channel_to(gateway.listen) as channel:
            streaming = stream(channel)
            await streaming.write(infer("slow-one", id="first"))
            for number in range(count):
                await streaming.write(infer("large-one", id=str(number)))
            await streaming.done_writing()
            before = -1
            while sent != before:
                before = sent
                await asyncio.sleep(0.5)
            assert sent < count * 3 / 4
            go.set()
            answers = await read_all(streaming)
    assert [answer.infer_response.id for answer in answers] == ["first", *map(str, range(count))]
