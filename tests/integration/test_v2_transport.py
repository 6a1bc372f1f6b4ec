"""What a caller notices of a call besides its tensors: compression, size, metadata, trailers, time, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from patience import wait_until
from tritonclient.grpc import service_pb2 as pb
from v2_calls import call, channel_to, infer, numbers, stream, stream_all
from v2_gateways import Script, endpoint_of, gateway_of, in_front_of

from gateway.app import Gateway
from gateway.config import load
from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

LIMIT = 64 << 10


@pytest.fixture(scope="module")
async def channel(gateway: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    async with channel_to(gateway.listen) as made:
        yield made


@pytest.fixture(scope="module")
async def small_gateway(triton: LocalTriton, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """Takes messages of up to LIMIT bytes, under a public name shorter than the model's own."""
    file = tmp_path_factory.mktemp("small") / "gateway.yaml"
    file.write_text(
        f"""
        listen: 127.0.0.1:0
        admin: {{listen: "127.0.0.1:0"}}
        telemetry: {{access_log: {{destination: none}}}}
        server: {{max_message_bytes: {LIMIT}, default_deadline: 500ms, max_deadline: 1s}}
        upstreams: {{main: {{endpoints: [{triton.grpc_address}]}}}}
        models:
          p: {{variants: {{only: {{upstream: main, model: params_echo}}}}}}
          n: {{variants: {{only: {{upstream: main, model: identity_int64}}}}}}
          w: {{variants: {{only: {{upstream: main, model: slow}}}}}}
          r: {{variants: {{only: {{upstream: main, model: repeat}}}}}}
        """
    )
    async with gateway_of(load(file, {})) as running:
        yield running


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_requests_are_understood(channel: grpc.aio.Channel, compression: grpc.Compression) -> None:
    values = np.zeros((8, 5000), np.float32)
    outcome = await call(channel, infer("adder", values), compression=compression)
    assert numbers(outcome.response) == [1.0] * 40_000


async def test_an_explicit_version_is_the_one_that_answers(channel: grpc.aio.Channel) -> None:
    outcome = await call(channel, infer("add_one_b", version="2"))
    assert (outcome.response.model_version, outcome.trailers["gateway-model-version"]) == ("2", "2")
    missing = await call(channel, infer("add_one_b", version="1"))
    assert (missing.code, missing.text) == (
        grpc.StatusCode.NOT_FOUND,
        "Request for unknown model: 'add_one_b' version 1 is not found",
    )


async def test_a_version_of_a_public_model_is_sought_among_its_variants(channel: grpc.aio.Channel) -> None:
    """Only one of the two variants has version 2."""
    for _ in range(6):
        outcome = await call(channel, infer("adder", version="2"))
        assert outcome.trailers["gateway-variant"] == "b"
    nowhere = await call(channel, infer("adder", version="77"))
    assert nowhere.code is grpc.StatusCode.NOT_FOUND
    assert "'adder' version 77" in nowhere.text


@pytest.mark.parametrize("id", ["", "a", "größe", "x" * 1000])
async def test_the_callers_id_comes_back(channel: grpc.aio.Channel, id: str) -> None:
    assert (await call(channel, infer("adder", id=id))).response.id == id


@pytest.mark.parametrize(("wanted", "version"), [("a", "1"), ("b", "2")])
async def test_trailers_name_who_answered(
    channel: grpc.aio.Channel, triton: LocalTriton, wanted: str, version: str
) -> None:
    outcome = await call(channel, infer("adder"), metadata=[("x-variant", wanted)])
    assert outcome.response.model_name == "adder"
    assert {key: value for key, value in outcome.trailing if key.startswith("gateway-")} == {
        "gateway-variant": wanted,
        "gateway-model-version": version,
        "gateway-endpoint": triton.grpc_address,
        "gateway-attempts": "1",
    }


# Size


def of_size(size: int) -> bytes:
    """A request of exactly so many bytes whose answer is short."""
    items = [0] * ((size - 100) // 4)
    short = len(infer("p", items, "INT32", id="x").SerializeToString())
    body = infer("p", items, "INT32", id="x" * (size - short + 1)).SerializeToString()
    assert len(body) == size
    return bytes(body)


async def test_a_message_up_to_the_limit_passes(small_gateway: Gateway) -> None:
    """Also if it grows on its way, because the model's own name is longer than the public one."""
    async with channel_to(small_gateway.listen) as channel:
        outcome = await call(channel, of_size(LIMIT))
    assert outcome.code is grpc.StatusCode.OK, outcome.text


async def test_a_message_above_the_limit_is_refused(small_gateway: Gateway) -> None:
    async with channel_to(small_gateway.listen) as channel:
        outcome = await call(channel, of_size(LIMIT + 1))
    assert outcome.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(LIMIT) in outcome.text


async def test_a_message_above_the_limit_ends_its_stream(small_gateway: Gateway) -> None:
    async with channel_to(small_gateway.listen) as channel:
        streaming = stream(channel)
        await streaming.write(pb.ModelInferRequest.FromString(of_size(LIMIT + 1)))
        assert await streaming.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_answer_above_the_limit_is_an_error_in_its_stream(small_gateway: Gateway) -> None:
    large = growing()
    large.id = "large"
    async with channel_to(small_gateway.listen) as channel:
        answers = await stream_all(channel, [large, infer("p", [0], "INT32", id="next")])
    assert [answer.infer_response.id for answer in answers] == ["large", "next"]
    assert [bool(answer.error_message) for answer in answers] == [True, False]


def growing() -> Any:
    """A short request whose answer is above the limit."""
    request = pb.ModelInferRequest(model_name="n")
    tensor = request.inputs.add(name="IN", datatype="INT64", shape=[1, 20_000])
    tensor.contents.int64_contents.extend([1] * 20_000)  # 1 byte each, and 8 in the answer
    return request


async def test_an_answer_above_the_limit_is_refused_and_not_asked_for_again(
    small_gateway: Gateway, triton: LocalTriton
) -> None:
    """It has been computed once; another attempt would only be as large."""
    async with channel_to(triton.grpc_address) as direct, channel_to(small_gateway.listen) as channel:
        before = await executions(direct, "identity_int64")
        outcome = await call(channel, growing())
        after = await executions(direct, "identity_int64")
    assert outcome.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "max_message_bytes" in outcome.text
    assert after - before == 1


async def executions(direct: grpc.aio.Channel, model: str) -> int:
    outcome = await call(direct, pb.ModelStatisticsRequest(name=model), "ModelStatistics")
    return int(pb.ModelStatisticsResponse.FromString(outcome.body).model_stats[0].execution_count)


async def test_large_tensors_pass_with_the_default_limit(channel: grpc.aio.Channel) -> None:
    raw = b"x" * (40 << 20)
    outcome = await call(channel, infer("same-bytes", [[raw]], "BYTES"))
    assert outcome.response.raw_output_contents[0][4:] == raw


# Time


async def test_a_deadline_that_passes_upstream_ends_the_call_and_leaves_nothing_in_flight(
    gateway: Gateway, channel: grpc.aio.Channel
) -> None:
    outcome = await call(channel, infer("waiter", [[4000]], "INT32"), timeout=0.15)
    assert outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED
    await wait_until(lambda: endpoint_of(gateway, "main").in_flight == 0)


async def test_upstream_gets_what_is_left_of_the_callers_time() -> None:
    left: list[float] = []

    async def note(body: bytes, context: Any) -> bytes:
        left.append(context.time_remaining())
        return b""

    async with in_front_of(Script(note)) as channel:
        await call(channel, infer("any"), timeout=2000)
        await call(channel, infer("any"), timeout=None)
    assert 1900 < left[0] < 2100  # grpc rounds up
    assert left[1] is None or left[1] > 1e6


async def test_the_gateway_gives_a_time_to_callers_that_set_none(small_gateway: Gateway) -> None:
    async with channel_to(small_gateway.listen) as channel:
        outcome = await call(channel, infer("w", [[3000]], "INT32"), timeout=None)
    assert outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_stream_gets_no_time_of_its_own(small_gateway: Gateway) -> None:
    """The configured times are those of unary calls; a stream may live as long as its caller does."""
    async with channel_to(small_gateway.listen) as channel:
        streaming = stream(channel, timeout=None)
        await asyncio.sleep(1.1)
        await streaming.write(infer("r", [1], "INT32"))
        answer = await streaming.read()
        streaming.cancel()
    assert answer.error_message == ""
    assert numbers(answer.infer_response) == [0]


async def test_a_cancelled_call_is_cancelled_upstream(
    gateway: Gateway, channel: grpc.aio.Channel, other_triton: LocalTriton
) -> None:
    endpoint = endpoint_of(gateway, "other")
    async with channel_to(other_triton.grpc_address) as direct:
        before = await executions(direct, "slow")
        calls = [asyncio.ensure_future(call(channel, infer("far-waiter", [[3000]], "INT32"))) for _ in range(3)]
        await wait_until(lambda: endpoint.in_flight > 0)  # the others may wait for their turn
        for made in calls:
            made.cancel()
        await wait_until(lambda: endpoint.in_flight == 0)
        assert await executions(direct, "slow") == before  # before any of them had an answer


async def test_a_cancellation_reaches_the_server() -> None:
    cancelled = asyncio.Event()
    started = asyncio.Event()

    async def hang(body: bytes, context: Any) -> bytes:
        started.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return b""

    async with in_front_of(Script(hang)) as channel:
        made = asyncio.ensure_future(call(channel, infer("any"), timeout=None))
        await started.wait()
        made.cancel()
        await asyncio.wait_for(cancelled.wait(), 60)


# Metadata

SENT = [
    ("x-user", "7"),
    ("x-twice", "a"),
    ("x-twice", "b"),
    ("x-blob-bin", b"\x00\xff"),
    ("authorization", "Bearer abc"),
    ("triton-grpc-protocol-infer", "secret"),
    ("gateway-upstream", "main"),
    ("gateway-mine", "1"),
    ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"),
]


async def test_metadata_reaches_the_server_without_what_is_not_for_it() -> None:
    async def answer(body: bytes, context: Any) -> bytes:
        return b""

    script = Script(answer)
    async with in_front_of(script) as channel:
        await call(channel, infer("any"), metadata=SENT)
        streaming = stream(channel, SENT)
        await streaming.write(infer("any"))
        await wait_until(lambda: len(script.metadata) == 2)
        streaming.cancel()
    for seen in script.metadata:
        ours = {key: value for key, value in seen.items() if key not in ("user-agent", "te", "grpc-accept-encoding")}
        assert ours == {
            "x-user": "7",
            "x-twice": "b",  # the dict keeps the last of the two
            "x-blob-bin": b"\x00\xff",
            "authorization": "Bearer abc",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",  # nothing here traces calls
            "triton-grpc-protocol-infer": "secret",
        }


@pytest.mark.parametrize("fails", [False, True])
async def test_metadata_of_the_server_reaches_the_caller(fails: bool) -> None:
    trailing = (("x-cost", "3"), ("gateway-variant", "forged"), ("x-blob-bin", b"\x00"))

    async def answer(body: bytes, context: Any) -> bytes:
        await context.send_initial_metadata((("x-first", "1"), ("gateway-first", "forged")))
        if fails:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "bad: \u00e4", trailing)
        context.set_trailing_metadata(trailing)
        return b""

    async with in_front_of(Script(answer)) as channel:
        outcome = await call(channel, infer("any"))
    assert ("x-cost", "3") in outcome.trailing
    assert ("x-blob-bin", b"\x00") in outcome.trailing
    assert "forged" not in dict(outcome.initial).values()
    assert "forged" not in outcome.trailers.values()
    if fails:
        assert (outcome.code, outcome.text) == (grpc.StatusCode.INVALID_ARGUMENT, "bad: \u00e4")
    else:
        assert ("x-first", "1") in outcome.initial
        assert outcome.trailers["gateway-attempts"] == "1"


@pytest.mark.parametrize("size", [100_000, 2_000_000])
async def test_an_error_text_that_repeats_a_long_name_ends_one_call_only(channel: grpc.aio.Channel, size: int) -> None:
    """Triton names the input that it does not know, in trailers on a connection that callers share."""
    neighbours = []
    for _ in range(10):
        outcome = await call(channel, infer("adder", name="n" * size))
        assert outcome.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        neighbours.append(asyncio.ensure_future(call(channel, infer("adder"))))
    assert {(await each).code for each in neighbours} == {grpc.StatusCode.OK}
