"""Small requests of several callers travel together, and nobody notices but in how fast it is."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest
import yaml
from patience import wait_until
from triton_fixture import TritonFactory
from tritonclient.grpc import service_pb2 as pb
from v2_calls import Outcome, batch_of, call, channel_to, channels_to
from v2_gateways import Script

from gateway.access.api_keys import hash_of
from gateway.app import Gateway, Place
from gateway.config import load
from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

CONFIG = """
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
telemetry: {{access_log: {{destination: none}}}}
upstreams: {{main: {{endpoints: [{endpoints}], probe_interval: 250ms}}}}
models:
  picky: {{variants: {{only: {{upstream: main, model: picky}}}}, merge: {{}}}}
  numbers: {{variants: {{only: {{upstream: main, model: identity_fp32}}}}, merge: {{}}}}
  texts: {{variants: {{only: {{upstream: main, model: identity_bytes}}}}, merge: {{rows: 4}}}}
"""


@contextlib.asynccontextmanager
async def merging(folder: Path, *endpoints: str, more: str = "") -> AsyncIterator[Gateway]:
    """more: sections of the config."""
    file = folder / "gateway.yaml"
    file.write_text(CONFIG.format(endpoints=", ".join(f'"{endpoint}"' for endpoint in endpoints)) + more)
    loaded = load(file, {})
    async with Gateway(loaded, lambda: load(file, {}), {}, Place("127.0.0.1:0")) as gateway:
        yield gateway


@pytest.fixture
async def gateway(tmp_path: Path, triton: LocalTriton) -> AsyncIterator[Gateway]:
    async with merging(tmp_path, triton.grpc_address) as gateway, channel_to(gateway.listen) as channel:
        for model, array in (("picky", floats(1, 0)), ("numbers", floats(1, 0)), ("texts", texts(1, "x"))):
            await call(channel, request(model, array))  # the first request makes the gateway ask for the model's config
        await asyncio.sleep(0.2)
        yield gateway


def floats(rows: int, nonce: float, columns: int = 2) -> np.ndarray:
    return np.arange(rows * columns, dtype=np.float32).reshape(rows, columns) + np.float32(nonce)


def texts(rows: int, nonce: str) -> list[list[bytes]]:
    return [[f"{nonce} {row} {'long ' * row}".encode()] for row in range(rows)]


def request(model: str, array: object, id: str = "") -> pb.ModelInferRequest:
    """A request of one raw input, floats or rows of texts."""
    message = pb.ModelInferRequest(model_name=model, id=id)
    if isinstance(array, np.ndarray):
        message.inputs.add(name="IN", datatype="FP32", shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    else:
        rows: Sequence[Sequence[bytes]] = array  # type: ignore[assignment]
        message.inputs.add(name="IN", datatype="BYTES", shape=[len(rows), len(rows[0])])
        flat = [element for row in rows for element in row]
        message.raw_input_contents.append(b"".join(len(e).to_bytes(4, "little") + e for e in flat))
    return message


async def picky_config(body: bytes, context: object) -> bytes:
    """What a scripted server says of `picky`."""
    message = pb.ModelConfigResponse()
    message.config.max_batch_size = 8
    return message.SerializeToString()


async def picky_metadata(body: bytes, context: object) -> bytes:
    message = pb.ModelMetadataResponse(name="picky", versions=["1"])
    message.outputs.add(name="OUT", datatype="FP32", shape=[-1, 2])
    return message.SerializeToString()


async def test_every_answer_is_the_one_that_a_request_alone_gets(gateway: Gateway, triton: LocalTriton) -> None:
    """Rows, ids, dtypes and shapes mixed by chance, and requests that can't be merged between them."""
    chance = random.Random(5)

    def draw(caller: int, number: int) -> pb.ModelInferRequest:
        rows, nonce, id = chance.randint(1, 3), caller * 1000 + number, chance.choice(["", f"{caller}/{number}"])
        if chance.random() < 0.5:
            message = request("numbers", floats(rows, nonce, chance.randint(1, 3)), id)
        else:
            message = request("texts", texts(rows, str(nonce)), id)
        if chance.random() < 0.1:
            message.parameters["priority"].int64_param = 0
        return message

    async with channels_to(gateway.listen, 6) as through, channel_to(triton.grpc_address) as direct:

        async def work(caller: int) -> list[Outcome]:
            outcomes = []
            for start in range(0, 60, 4):
                messages = [draw(caller, number) for number in range(start, start + 4)]
                got = await asyncio.gather(*(call(through[caller], message) for message in messages))
                for message, outcome in zip(messages, got, strict=True):
                    assert outcome.code is grpc.StatusCode.OK, outcome.text
                    alone = pb.ModelInferRequest()
                    alone.CopyFrom(message)
                    alone.model_name = {"numbers": "identity_fp32", "texts": "identity_bytes"}[message.model_name]
                    expected = (await call(direct, alone)).response
                    expected.model_name = message.model_name
                    assert outcome.response == expected
                outcomes += got
            return outcomes

        outcomes = [outcome for each in await asyncio.gather(*map(work, range(6))) for outcome in each]
    assert max(map(batch_of, outcomes)) > 1


async def test_what_arrives_together_is_sent_together(gateway: Gateway) -> None:
    """One leaves alone at first, and the others while it is in flight; unless the machine is busy, so again then."""
    largest = 0
    async with channels_to(gateway.listen, 8) as through:
        for _ in range(50):
            calls = (call(channel, request("picky", floats(1, n))) for n, channel in enumerate(through))
            outcomes = await asyncio.gather(*calls)
            assert [list(np.frombuffer(o.response.raw_output_contents[0], np.float32)) for o in outcomes] == [
                [n, n + 1] for n in range(8)
            ]
            largest = max(map(batch_of, outcomes))
            if largest >= 4:
                break
    assert largest >= 4


async def test_one_callers_bad_input_fails_nobody_else(gateway: Gateway) -> None:
    async with channels_to(gateway.listen, 8) as through:
        for _ in range(5):
            numbers = [-1.0 if n == 3 else float(n) for n in range(8)]
            calls = (
                call(channel, request("picky", floats(1, number)))
                for number, channel in zip(numbers, through, strict=True)
            )
            outcomes = await asyncio.gather(*calls)
            for n, outcome in enumerate(outcomes):
                if n == 3:
                    assert (outcome.code, outcome.text) == (grpc.StatusCode.INVALID_ARGUMENT, "a number is negative")
                else:
                    assert outcome.code is grpc.StatusCode.OK


async def test_a_caller_that_keeps_spoiling_batches_is_left_alone_for_a_while(gateway: Gateway) -> None:
    async with channels_to(gateway.listen, 4) as through:

        async def round_of(numbers: Sequence[float]) -> list[Outcome]:
            calls = (call(c, request("picky", floats(1, number))) for number, c in zip(numbers, through, strict=True))
            return await asyncio.gather(*calls)

        for _ in range(10):
            await round_of([1, 2, 3, -5])
        largest = 0
        for _ in range(20):
            outcomes = await round_of([1, 2, 3, -5])
            good = [outcome for outcome in outcomes if outcome.code is grpc.StatusCode.OK]
            assert len(good) == 3
            assert batch_of(outcomes[3]) == 1
            largest = max(largest, *map(batch_of, good))
        assert largest > 1  # they are merged again, since nobody spoils it


async def test_a_caller_with_a_name_is_left_alone_by_whatever_connection_he_comes(tmp_path: Path) -> None:
    """On a scripted server, which tells how many of its requests were spoilt."""
    spoilt: list[int] = []  # their rows

    async def infer(body: bytes, context: grpc.aio.ServicerContext) -> bytes:
        asked = pb.ModelInferRequest.FromString(body)
        await asyncio.sleep(0.01)
        if min(np.frombuffer(asked.raw_input_contents[0], np.float32)) < 0:
            spoilt.extend([asked.inputs[0].shape[0]] if asked.inputs[0].shape[0] > 1 else [])
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a number is negative")
        answer = pb.ModelInferResponse(model_name="picky", model_version="1")
        answer.outputs.add(name="OUT", datatype="FP32", shape=asked.inputs[0].shape)
        answer.raw_output_contents.extend(asked.raw_input_contents)
        return answer.SerializeToString()

    async def statistics(body: bytes, context: object) -> bytes:
        return pb.ModelStatisticsResponse().SerializeToString()

    keys = {name: f"igk_{name}-{'0' * 40}" for name in ("eve", "ann")}
    ann, eve = ([("authorization", f"Bearer {keys[name]}")] for name in ("ann", "eve"))
    api_keys = [{"caller": name, "sha256": hash_of(key).hex()} for name, key in keys.items()]
    access = yaml.safe_dump({"access": {"api_keys": api_keys, "grants": [{"callers": list(keys), "models": ["*"]}]}})
    others = {"ModelConfig": picky_config, "ModelMetadata": picky_metadata, "ModelStatistics": statistics}
    async with (
        Script(infer=infer, others=others).serve() as address,
        merging(tmp_path, address, more=access) as gateway,
        channels_to(gateway.listen, 3) as through,
        channels_to(gateway.listen, 20) as hers,
    ):
        await asyncio.gather(*(channel.channel_ready() for channel in (*through, *hers)))
        await call(through[0], request("picky", floats(1, 0)), metadata=ann)
        await asyncio.sleep(0.2)

        async def come(channel: grpc.aio.Channel) -> None:
            calls = [call(each, request("picky", floats(1, n)), metadata=ann) for n, each in enumerate(through)]
            *good, bad = await asyncio.gather(*calls, call(channel, request("picky", floats(1, -5)), metadata=eve))
            assert {outcome.code for outcome in good} == {grpc.StatusCode.OK}
            assert bad.code is grpc.StatusCode.INVALID_ARGUMENT

        for channel in hers[:10] * 20:
            await come(channel)
            if len(spoilt) == 3:
                break
        for channel in hers[10:]:
            await come(channel)
        assert len(spoilt) == 3, spoilt


async def test_a_member_that_goes_away_takes_nobody_along(gateway: Gateway) -> None:
    chance = random.Random(7)
    async with channels_to(gateway.listen, 6) as through:

        async def work(channel: grpc.aio.Channel, stays: bool) -> None:
            for number in range(25):
                task = asyncio.ensure_future(call(channel, request("picky", floats(1, number))))
                if not stays:
                    await asyncio.sleep(chance.uniform(0, 0.02))
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
                    continue
                outcome = await task
                assert outcome.code is grpc.StatusCode.OK, outcome.text
                assert np.frombuffer(outcome.response.raw_output_contents[0], np.float32)[0] == number

        await asyncio.gather(*(work(channel, n % 2 == 0) for n, channel in enumerate(through)))
    [endpoint] = gateway._topology.now.pools["main"].endpoints
    await asyncio.wait_for(endpoint.wait_idle(), 60)


async def test_a_batch_that_nobody_waits_for_is_called_back(tmp_path: Path) -> None:
    """On a scripted server, since only that can tell that a call of its was cancelled."""
    sizes: list[int] = []
    cancelled: list[int] = []
    go_on = asyncio.Event()

    async def infer(body: bytes, context: object) -> bytes:
        rows = pb.ModelInferRequest.FromString(body).inputs[0].shape[0]
        sizes.append(rows)
        try:
            await (go_on.wait() if rows == 1 else asyncio.sleep(30))
        except asyncio.CancelledError:
            cancelled.append(rows)
            raise
        answer = pb.ModelInferResponse(model_name="picky", model_version="1", raw_output_contents=[bytes(8)])
        answer.outputs.add(name="OUT", datatype="FP32", shape=[1, 2])
        return answer.SerializeToString()

    async def statistics(body: bytes, context: object) -> bytes:
        return pb.ModelStatisticsResponse().SerializeToString()

    go_on.set()
    others = {"ModelConfig": picky_config, "ModelMetadata": picky_metadata, "ModelStatistics": statistics}
    async with (
        Script(infer=infer, others=others).serve() as address,
        merging(tmp_path, address) as gateway,
        channels_to(gateway.listen, 4) as through,
    ):
        await call(through[0], request("picky", floats(1, 0)))
        await asyncio.sleep(0.2)
        go_on.clear()
        first = asyncio.ensure_future(call(through[0], request("picky", floats(1, 0))))
        await wait_until(lambda: len(sizes) == 2)
        waiting = [asyncio.ensure_future(call(channel, request("picky", floats(1, 1)))) for channel in through[1:]]
        await asyncio.sleep(0.2)  # they wait for the first one
        go_on.set()
        await wait_until(lambda: sizes[-1] == 3)
        for number, task in enumerate(waiting):
            assert not cancelled
            task.cancel()
            await asyncio.sleep(0.1 if number < 2 else 0)
        await wait_until(lambda: cancelled == [3])
        assert (await first).code is grpc.StatusCode.OK
        [endpoint] = gateway._topology.now.pools["main"].endpoints
        await asyncio.wait_for(endpoint.wait_idle(), 60)


async def test_an_answer_with_parameters_is_not_divided_and_its_model_not_merged_until_it_changes(
    tmp_path: Path,
) -> None:
    """They are said of the whole. On a scripted server: the Python backend of this Triton knows no such answers."""
    sizes: list[int] = []
    told = pb.ModelStatistics(name="picky", version="1", inference_count=100, execution_count=100)

    async def infer(body: bytes, context: object) -> bytes:
        asked = pb.ModelInferRequest.FromString(body)
        rows = asked.inputs[0].shape[0]
        sizes.append(rows)
        await asyncio.sleep(0.02)
        answer = pb.ModelInferResponse(model_name="picky", model_version="1")
        answer.raw_output_contents.extend(asked.raw_input_contents)
        answer.outputs.add(name="OUT", datatype="FP32", shape=[rows, 2])
        if rows > 1:
            answer.parameters["rows"].int64_param = rows
        return answer.SerializeToString()

    async def statistics(body: bytes, context: object) -> bytes:
        return pb.ModelStatisticsResponse(model_stats=[told]).SerializeToString()

    others = {"ModelConfig": picky_config, "ModelMetadata": picky_metadata, "ModelStatistics": statistics}
    async with (
        Script(infer=infer, others=others).serve() as address,
        merging(tmp_path, address) as gateway,
        channels_to(gateway.listen, 8) as through,
    ):

        async def all_call() -> None:
            outcomes = await asyncio.gather(*(call(c, request("picky", floats(1, n))) for n, c in enumerate(through)))
            for n, outcome in enumerate(outcomes):
                assert not outcome.response.parameters
                assert list(np.frombuffer(outcome.response.raw_output_contents[0], np.float32)) == [n, n + 1]

        async def until_merged() -> None:
            for _ in range(600):
                await all_call()
                if max(sizes) > 1:
                    return
            raise AssertionError("nothing is merged")

        await until_merged()  # it was tried
        sizes.clear()
        await asyncio.sleep(1.0)  # some probes
        await all_call()
        assert max(sizes) == 1
        told.inference_count = 1  # loaded anew, which a probe will tell
        await until_merged()


async def test_a_deadline_ends_its_own_member_only(gateway: Gateway) -> None:
    async with channels_to(gateway.listen, 6) as through:
        for _ in range(5):
            timeouts = [0.004 if n == 2 else 120 for n in range(6)]
            calls = (
                call(channel, request("picky", floats(1, n)), timeout=timeouts[n]) for n, channel in enumerate(through)
            )
            outcomes = await asyncio.gather(*calls)
            others = [outcome.code for n, outcome in enumerate(outcomes) if n != 2]
            assert others == [grpc.StatusCode.OK] * 5
            assert outcomes[2].code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.OK)


@pytest.mark.parametrize(
    ("limits", "timeout"), [("default_deadline: 500ms", None), ("max_deadline: 500ms", 120)], ids=["default", "longest"]
)
async def test_the_gateway_s_own_deadlines_end_members_of_a_batch_too(
    tmp_path: Path, limits: str, timeout: float | None
) -> None:
    async def infer(body: bytes, context: object) -> bytes:
        rows = pb.ModelInferRequest.FromString(body).inputs[0].shape[0]
        if rows > 1 or is_slow.is_set():
            await asyncio.sleep(30)
        answer = pb.ModelInferResponse(model_name="picky", model_version="1", raw_output_contents=[bytes(8)])
        answer.outputs.add(name="OUT", datatype="FP32", shape=[1, 2])
        return answer.SerializeToString()

    async def statistics(body: bytes, context: object) -> bytes:
        return pb.ModelStatisticsResponse().SerializeToString()

    is_slow = asyncio.Event()
    others = {"ModelConfig": picky_config, "ModelMetadata": picky_metadata, "ModelStatistics": statistics}
    async with (
        Script(infer=infer, others=others).serve() as address,
        merging(tmp_path, address, more=f"server: {{{limits}}}\n") as gateway,
        channels_to(gateway.listen, 4) as through,
    ):
        await call(through[0], request("picky", floats(1, 0)))
        await asyncio.sleep(0.2)
        is_slow.set()
        calls = [call(channel, request("picky", floats(1, 1)), timeout=timeout) for channel in through]
        ends = await asyncio.wait_for(asyncio.gather(*calls), 60)
        assert [end.code for end in ends] == [grpc.StatusCode.DEADLINE_EXCEEDED] * 4
        [endpoint] = gateway._topology.now.pools["main"].endpoints
        await asyncio.wait_for(endpoint.wait_idle(), 60)


async def test_when_a_triton_dies_every_member_ends_once_and_moves_on(
    tmp_path: Path, triton_factory: TritonFactory
) -> None:
    first, second = await asyncio.gather(triton_factory(["picky"]), triton_factory(["picky"]))
    async with (
        merging(tmp_path, first.grpc_address, second.grpc_address) as gateway,
        channels_to(gateway.listen, 8) as through,
    ):
        stop = asyncio.Event()
        outcomes: list[Outcome] = []

        async def work(caller: int) -> None:
            number = 0
            while not stop.is_set():
                nonce = caller * 10_000 + number
                outcome = await call(through[caller], request("picky", floats(1, nonce)))
                if outcome.code is grpc.StatusCode.OK:
                    assert np.frombuffer(outcome.response.raw_output_contents[0], np.float32)[0] == nonce
                outcomes.append(outcome)
                number += 1

        working = [asyncio.ensure_future(work(caller)) for caller in range(8)]
        await asyncio.sleep(1.0)
        await first.kill()
        await asyncio.sleep(1.5)
        stop.set()
        await asyncio.wait_for(asyncio.gather(*working), 120)
    codes = {outcome.code for outcome in outcomes}
    assert codes == {grpc.StatusCode.OK}
    assert max(map(batch_of, outcomes)) > 1
