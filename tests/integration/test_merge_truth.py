"""A merged answer is the one that its caller would have got alone, whatever the request asks for and the model does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from patience import wait_until
from triton_fixture import FAST_START, TritonFactory, for_the_whole_run
from tritonclient.grpc import service_pb2 as pb
from v2_calls import Metadata, Outcome, batch_of, call, channel_to, channels_to, infer

from gateway.app import Gateway, Place
from gateway.config import load
from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

MODELS = ("versions", "odd_axis", "per_id", "totals", "identity_fp32", "identity_bytes", "classifier")
CALLERS = 24

CONFIG = """
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
telemetry: {{access_log: {{destination: none}}}}
upstreams: {{main: {{endpoints: ["{endpoint}"], probe_interval: 1s}}}}
models:
"""


@pytest.fixture(scope="module")
async def server(triton_repository: Path) -> AsyncIterator[LocalTriton]:
    """One of its own, since its models are loaded anew. It makes parameters of what begins with `x-`."""
    extra = (*FAST_START, "--grpc-header-forward-pattern=x-.*")
    async with for_the_whole_run(LocalTriton(triton_repository, models=MODELS, extra=extra)) as running:
        yield running


@contextlib.asynccontextmanager
async def merging(folder: Path, endpoint: str, **merge: object) -> AsyncIterator[Gateway]:
    """A gateway that merges each of MODELS under its own name with `-m`."""
    file = folder / "gateway.yaml"
    models = [
        f"  {name}-m: {{variants: {{only: {{upstream: main, model: {name}}}}}, merge: {json.dumps(merge)}}}"
        for name in MODELS
    ]
    file.write_text(CONFIG.format(endpoint=endpoint) + "\n".join(models))
    loaded = load(file, {})
    async with Gateway(loaded, lambda: load(file, {}), {}, Place("127.0.0.1:0")) as gateway:
        yield gateway


async def at_once(
    channels: Sequence[grpc.aio.Channel],
    rounds: int,
    make: Callable[[int, int], tuple[Any, Metadata]],
    check: Callable[[Any, Metadata, Outcome], bool],
) -> tuple[int, int, int]:
    """Every caller calls `rounds` times. Answers (wrong answers, all answers, the largest batch)."""
    wrong = largest = 0

    async def work(caller: int) -> None:
        nonlocal wrong, largest
        for number in range(rounds):
            message, metadata = make(caller, number)
            outcome = await call(channels[caller], message, metadata=metadata)
            largest = max(largest, batch_of(outcome))
            wrong += not check(message, metadata, outcome)

    await asyncio.gather(*(work(caller) for caller in range(len(channels))))
    return wrong, rounds * len(channels), largest


def own_numbers(caller: int, number: int) -> list[list[float]]:
    return [[caller + number / 128, 1.0]]


def numbers_of(outcome: Outcome) -> np.ndarray:
    assert outcome.code is grpc.StatusCode.OK, outcome.text
    return np.frombuffer(outcome.response.raw_output_contents[0], np.float32)


def sent(message: Any) -> np.ndarray:
    return np.frombuffer(message.raw_input_contents[0], np.float32)


def texts_of(outcome: Outcome) -> list[bytes]:
    raw, texts = outcome.response.raw_output_contents[0], []
    while raw:
        size = int.from_bytes(raw[:4], "little")
        texts.append(raw[4 : 4 + size])
        raw = raw[4 + size :]
    return texts


async def load_totals(channel: grpc.aio.Channel, max_batch_size: int) -> None:
    """Load `totals` anew; its requests have the same shapes whether it batches or not."""
    tensor = {"data_type": "TYPE_FP32", "dims": [2] if max_batch_size else [-1, 2]}
    config = {
        "name": "totals",
        "backend": "python",
        "max_batch_size": max_batch_size,
        "input": [{"name": "IN", **tensor}],
        "output": [{"name": "OUT", **tensor}],
        "instance_group": [{"kind": "KIND_CPU", "count": 1}],
        **({"dynamic_batching": {}} if max_batch_size else {}),
    }
    request = pb.RepositoryModelLoadRequest(model_name="totals")
    request.parameters["config"].string_param = json.dumps(config)
    outcome = await call(channel, request, "RepositoryModelLoad")
    assert outcome.code is grpc.StatusCode.OK, outcome.text


async def test_the_version_that_was_asked_for_answers_and_one_that_is_not_there_is_not_found(
    tmp_path: Path, server: LocalTriton
) -> None:
    asked = ("1", "1", "2", "")

    def make(caller: int, number: int) -> tuple[Any, Metadata]:
        version = "99" if (caller + number) % 12 == 0 else asked[caller % 4]
        return infer("versions-m", own_numbers(caller, number), version=version), ()

    def is_right(message: Any, _: Metadata, outcome: Outcome) -> bool:
        if message.model_version == "99":
            return outcome.code is grpc.StatusCode.NOT_FOUND
        added = 100 * int(message.model_version or "2")
        return bool(
            (numbers_of(outcome) == sent(message) + np.float32(added)).all()
        ) and outcome.response.model_version == outcome.trailers["gateway-model-version"] == str(added // 100)

    async with merging(tmp_path, server.grpc_address) as gateway, channels_to(gateway.listen, CALLERS) as through:
        await at_once(through[1:4], 2, make, is_right)
        wrong, answers, largest = await at_once(through, 20, make, is_right)
    assert (wrong, answers) == (0, 480)
    assert largest > 2


async def test_outputs_whose_first_axis_is_not_the_batch_reach_their_own_caller_only(
    tmp_path: Path, server: LocalTriton
) -> None:
    """Two words of one caller and none of the next are as many as their rows: a merged answer fits by chance."""

    def make(caller: int, number: int) -> tuple[Any, Metadata]:
        words = " ".join(f"{caller}/{number}/{n}" for n in range(0 if caller % 2 else 2))
        return infer("odd_axis-m", [[words.encode()]], "BYTES"), ()

    def is_right(message: Any, _: Metadata, outcome: Outcome) -> bool:
        assert outcome.code is grpc.StatusCode.OK, outcome.text
        return texts_of(outcome) == message.raw_input_contents[0][4:].split()

    async with merging(tmp_path, server.grpc_address) as gateway, channels_to(gateway.listen, CALLERS) as through:
        wrong, answers, _ = await at_once(through, 20, make, is_right)
    assert (wrong, answers) == (0, 480)


@pytest.mark.parametrize("way", ["at Triton", "through the gateway"])
async def test_a_model_that_stops_batching_while_it_is_called_answers_nobody_wrongly(
    tmp_path: Path, server: LocalTriton, way: str
) -> None:
    """Right is what either of its two ways gives for the caller's own request alone."""
    counts = {"rows": 0, "whole": 0}

    def make(caller: int, number: int) -> tuple[Any, Metadata]:
        return infer("totals-m", own_numbers(caller, number)), ()

    def is_right(message: Any, _: Metadata, outcome: Outcome) -> bool:
        alone, got = sent(message), numbers_of(outcome)
        how = "rows" if (got == alone).all() else "whole" if (got == alone + alone.sum()).all() else "wrong"
        counts[how] = counts.get(how, 0) + 1
        return how != "wrong"

    async with (
        merging(tmp_path, server.grpc_address, recheck="0s") as gateway,
        channels_to(gateway.listen, CALLERS) as through,
        channel_to(server.grpc_address if way == "at Triton" else gateway.listen) as control,
    ):
        try:
            for size in (0, 16, 0):
                calling = asyncio.ensure_future(at_once(through, 16, make, is_right))
                await asyncio.sleep(0.15)
                await load_totals(control, size)
                wrong, _, _ = await calling
                assert wrong == 0
                for _ in range(100):  # what was done at Triton becomes known by a probe
                    wrong, _, largest = await at_once(through, 10, make, is_right)
                    assert wrong == 0
                    if way != "at Triton" or (largest > 1) is (size > 0):
                        break
                    await asyncio.sleep(0.2)
                assert (largest > 1) is (size > 0)
        finally:
            await load_totals(control, 16)
    assert counts["whole"] > 200
    assert counts["rows"] > 200


async def test_a_model_that_stopped_batching_between_calls_answers_nobody_wrongly(
    tmp_path: Path, server: LocalTriton
) -> None:
    """As a config is by default, and before any probe could have told."""

    def make(caller: int, number: int) -> tuple[Any, Metadata]:
        return infer("totals-m", own_numbers(caller, number)), ()

    def is_right(message: Any, _: Metadata, outcome: Outcome) -> bool:
        alone, got = sent(message), numbers_of(outcome)
        return bool((got == alone + alone.sum()).all())

    async with (
        merging(tmp_path, server.grpc_address) as gateway,
        channels_to(gateway.listen, CALLERS) as through,
        channel_to(server.grpc_address) as control,
    ):
        try:
            _, _, largest = await at_once(through, 10, make, lambda *_: True)
            assert largest > 1
            await load_totals(control, 0)
            assert (await at_once(through, 10, make, is_right))[:2] == (0, 240)
        finally:
            await load_totals(control, 16)


async def test_what_is_remembered_of_a_model_ends_when_it_is_loaded_anew_from_the_same_files(
    tmp_path: Path, server: LocalTriton
) -> None:
    """Of several probes none ends it; the first after the load does."""
    async with (
        merging(tmp_path, server.grpc_address) as gateway,
        channel_to(gateway.listen) as through,
        channel_to(server.grpc_address) as direct,
    ):
        [endpoint] = gateway._topology.now.pools["main"].endpoints
        for number in range(3):
            await call(through, infer("versions-m", own_numbers(0, number)))
        known = endpoint.known("versions", "")
        await asyncio.sleep(2.5)
        assert known.is_current
        await call(direct, pb.RepositoryModelLoadRequest(model_name="versions"), "RepositoryModelLoad")
        await wait_until(lambda: not known.is_current)
        assert endpoint.known("versions", "") is not known


async def test_what_is_remembered_ends_when_an_endpoint_was_started_again(
    tmp_path: Path, triton_factory: TritonFactory
) -> None:
    """Also if it was so quick that every probe was answered."""
    server = await triton_factory(["totals"])
    async with merging(tmp_path, server.grpc_address) as gateway, channel_to(gateway.listen) as through:
        [endpoint] = gateway._topology.now.pools["main"].endpoints
        await call(through, infer("totals-m", own_numbers(0, 0)))
        known = endpoint.known("totals", "")
        await wait_until(lambda: any(each[1] for each in known.counts.values()))
        await server.kill()
        await server.start()
        await wait_until(lambda: not known.is_current)


async def test_metadata_that_models_see_and_ids_reach_them_with_each_callers_own_value(
    tmp_path: Path, server: LocalTriton
) -> None:
    """What Triton forwards as parameters. Requests with equal values travel together, and none with another's."""

    def make(caller: int, number: int) -> tuple[Any, Metadata]:
        id = f"{caller}-{number}" if number % 5 == 0 else ""
        return infer("per_id-m", own_numbers(caller, number), id=id), (("x-tenant", f"t{caller % 3}"),)

    def is_right(message: Any, metadata: Metadata, outcome: Outcome) -> bool:
        assert outcome.code is grpc.StatusCode.OK, outcome.text
        told = json.loads(texts_of(outcome)[0])
        return bool(told == {"id": message.id, "parameters": dict(metadata)} and outcome.response.id == message.id)

    async with merging(tmp_path, server.grpc_address) as gateway, channels_to(gateway.listen, CALLERS) as through:
        await call(through[0], infer("per_id-m", own_numbers(0, 0)))
        wrong, answers, largest = await at_once(through, 10, make, is_right)
    assert (wrong, answers) == (0, 240)
    assert largest > 1


async def test_the_keys_that_a_config_lists_must_be_equal_and_no_others(tmp_path: Path, server: LocalTriton) -> None:
    def make(caller: int, number: int) -> tuple[Any, Metadata]:
        metadata = (("x-tenant", f"t{caller % 2}"), ("x-session", f"{caller}"))
        return infer("per_id-m", own_numbers(caller, number), id=f"{caller}"), metadata

    def is_right(message: Any, metadata: Metadata, outcome: Outcome) -> bool:
        told = json.loads(texts_of(outcome)[0])
        return bool(told["parameters"]["x-tenant"] == metadata[0][1] and outcome.response.id == message.id)

    options = {"metadata": ["x-tenant"], "ignore_ids": True}
    async with (
        merging(tmp_path, server.grpc_address, **options) as gateway,
        channels_to(gateway.listen, CALLERS) as through,
    ):
        wrong, _, largest = await at_once(through, 10, make, is_right)
    assert wrong == 0
    assert largest > 2


async def test_whatever_callers_send_at_once_is_answered_as_triton_answers_it_directly(
    tmp_path: Path, server: LocalTriton
) -> None:
    """Requests of every kind mixed by chance, each compared byte for byte with Triton's own answer."""
    chance = random.Random(11)

    def draw() -> tuple[Any, Metadata]:
        rows = chance.choice([1, 1, 1, 2, 3])
        model = chance.choice(["versions", "odd_axis", "per_id", "identity_fp32", "identity_bytes", "classifier"])
        columns = 4 if model == "classifier" else 2
        floats = [[chance.random() for _ in range(columns)] for _ in range(rows)]
        texts = [[b" ".join(b"%d" % chance.randint(0, 99) for _ in range(chance.randint(1, 3)))] for _ in range(rows)]
        is_text = model in ("odd_axis", "identity_bytes")
        message = infer(model, texts if is_text else floats, "BYTES" if is_text else "FP32")
        message.model_version = chance.choice(["", "", "1", "2", "99"]) if model == "versions" else ""
        message.id = chance.choice(["", "", "", "7", "abc"])
        if chance.random() < 0.3:
            message.outputs.add(name="OUT")
            if model == "classifier" and chance.random() < 0.5:
                message.outputs[0].parameters["classification"].int64_param = 2
        if chance.random() < 0.1:
            message.parameters["note"].string_param = chance.choice("ab")
        if chance.random() < 0.05:
            message.inputs[0].datatype = "INT8"  # which is refused
        if chance.random() < 0.05:
            message.MergeFromString(b"\xf2\x06\x03new")  # a field that nobody knows
        metadata = chance.choice([(), (), (("x-tenant", chance.choice("ab")),)])
        return message, metadata

    async with (
        merging(tmp_path, server.grpc_address) as gateway,
        channels_to(gateway.listen, CALLERS) as through,
        channel_to(server.grpc_address) as direct,
    ):
        drawn = [[draw() for _ in range(12)] for _ in through]
        differing: list[tuple[Any, Outcome, Outcome]] = []
        largest = 0

        async def work(channel: grpc.aio.Channel, requests: Sequence[tuple[Any, Metadata]]) -> None:
            nonlocal largest
            for message, metadata in requests:
                alone = await call(direct, message, metadata=metadata)
                renamed = type(message)()
                renamed.CopyFrom(message)
                renamed.model_name += "-m"
                outcome = await call(channel, renamed, metadata=metadata)
                largest = max(largest, batch_of(outcome))
                if (outcome.code, without_name(outcome)) != (alone.code, without_name(alone)):
                    differing.append((message, alone, outcome))

        await asyncio.gather(*(work(*each) for each in zip(through, drawn, strict=True)))
    assert not differing
    assert largest > 1


def without_name(outcome: Outcome) -> object:
    """What it says, apart from the name under which the gateway has the model."""
    if outcome.code is not grpc.StatusCode.OK:
        return outcome.text.replace("-m'", "'")
    response = outcome.response
    response.model_name = ""
    return response.SerializeToString(deterministic=True)
