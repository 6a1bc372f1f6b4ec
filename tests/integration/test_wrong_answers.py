"""An answer that is wrong in kind is counted, or never reaches its caller, whichever way it comes."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from traffic import OK, config, gateway, http, until, write
from v2_calls import call, channel_to, infer, numbers, stream_all

from gateway.app import Gateway
from gateway.triton import LocalTriton

pytestmark = pytest.mark.integration

VARIANTS = {"new": {"upstream": "main", "model": "faulty"}, "old": {"upstream": "main", "model": "add_one_a"}}
NAN, INFINITY, SHAPE, DATATYPE = -1.0, -2.0, -3.0, -4.0


def serve(triton: LocalTriton, folder: Path, answers: dict[str, Any], **more: Any) -> Any:
    models = {"adder": {"variants": VARIANTS, "answers": answers, **more}}
    return gateway(write(folder / "gateway.yaml", config({"main": triton.grpc_address}, models)))


def found(running: Gateway, variant: str = "new") -> dict[str, int]:
    """What was found in the answers of a variant, so far."""
    each = {answers.variant: answers.results for answers in running._checks.now()}
    return {result: count for result, count in each.get(variant, {}).items() if count}


async def know_the_model(running: Gateway, channel: grpc.aio.Channel) -> None:
    """Call until the metadata of the model is known, without which no answer is held to it."""
    await call(channel, infer("adder", [[5.0, 5.0]]))
    endpoint = running._topology.now.pools["main"].endpoints[0]
    known = lambda: endpoint.known("faulty", "1").kept["outputs"].declared is not None  # noqa: E731
    await until(known, 20, "the model's metadata", lambda: str(endpoint.remembered))


@pytest.mark.parametrize("asked", [NAN, INFINITY, SHAPE, DATATYPE], ids=["nan", "infinity", "shape", "datatype"])
async def test_the_fallback_answers_in_its_place(triton: LocalTriton, tmp_path: Path, asked: float) -> None:
    answers = {"finite": "fallback", "contract": "fallback"}
    async with serve(triton, tmp_path, answers) as running, channel_to(running.listen) as channel:
        await know_the_model(running, channel)
        outcome = await call(channel, infer("adder", [[asked, 5.0]]))
        assert outcome.code is OK
        assert numbers(outcome.response) == [asked + 1.0, 6.0]
        assert outcome.trailers["gateway-variant"] == "old"
        assert outcome.trailers["gateway-fallback-reason"] == "wrong"
        kind = "not_finite" if asked in (NAN, INFINITY) else "contract"
        assert found(running) == {"fine": 1, kind: 1}
        assert found(running, "old") == {"fine": 1}


async def test_without_a_fallback_the_call_fails_and_says_why(triton: LocalTriton, tmp_path: Path) -> None:
    answers = {"finite": "fallback"}
    async with (
        serve(triton, tmp_path, answers, fallback="forbid") as running,
        channel_to(running.listen) as channel,
    ):
        outcome = await call(channel, infer("adder", [[NAN, 5.0]]))
        assert outcome.code is grpc.StatusCode.INTERNAL
        assert outcome.text == "The endpoint's answer can't be used: output 'OUT' has NaN or infinity"


async def test_what_is_counted_only_is_passed_on(triton: LocalTriton, tmp_path: Path) -> None:
    async with serve(triton, tmp_path, {}) as running, channel_to(running.listen) as channel:
        await know_the_model(running, channel)
        outcome = await call(channel, infer("adder", [[NAN, 5.0]]))
        assert all(math.isnan(number) for number in numbers(outcome.response))
        assert (await call(channel, infer("adder", [[SHAPE, 5.0]]))).response.outputs[0].shape == [1, 2, 1]
        assert found(running) == {"fine": 1, "not_finite": 1, "contract": 1}
        _, metrics = await http(running.admin_address, "/metrics")
        line = 'gateway_answers_checked_total{model="adder",result="not_finite",variant="new"} 1.0'
        assert line in metrics


async def test_a_model_that_was_replaced_by_another_is_not_held_to_what_it_was(
    triton: LocalTriton, tmp_path: Path
) -> None:
    answers = {"contract": "fallback"}
    async with serve(triton, tmp_path, answers) as running, channel_to(running.listen) as channel:
        await know_the_model(running, channel)
        kept = running._topology.now.pools["main"].endpoints[0].known("faulty", "1").kept
        kept["outputs"].declared = {"OUT": ("INT8", (-1, 7))}  # as another model of this name had it
        outcomes = await asyncio.gather(*(call(channel, infer("adder", [[float(n), 5.0]])) for n in range(9)))
        assert {outcome.trailers["gateway-variant"] for outcome in outcomes} == {"new"}
        assert found(running) == {"fine": 10}


async def test_one_row_that_is_wrong_harms_no_row_that_it_was_merged_with(triton: LocalTriton, tmp_path: Path) -> None:
    answers = {"finite": "fallback"}
    async with (
        serve(triton, tmp_path, answers, merge={"recheck": "10ms"}) as running,
        channel_to(running.listen) as channel,
    ):
        merged = made = 0
        while not merged and made < 600:  # nothing merges before the model is proven to batch
            asked = [NAN if n % 7 == 0 else float(n) for n in range(30)]
            ended = await asyncio.gather(*(call(channel, infer("adder", [[n, 1.0]])) for n in asked))
            assert [numbers(each.response) for each in ended] == [[n + 1.0, 2.0] for n in asked]
            by = {each.trailers["gateway-variant"] for n, each in zip(asked, ended, strict=True) if n == NAN}
            assert by == {"old"}
            made += len(ended)
            merged += sum("gateway-batch" in each.trailers for each in ended)
        assert merged


async def test_a_message_of_a_stream_is_answered_by_the_fallback(triton: LocalTriton, tmp_path: Path) -> None:
    answers = {"finite": "fallback", "contract": "fallback"}
    async with serve(triton, tmp_path, answers) as running, channel_to(running.listen) as channel:
        await know_the_model(running, channel)
        asked = [5.0, NAN, 7.0, SHAPE, DATATYPE, INFINITY]
        got = await stream_all(channel, [infer("adder", [[n, 1.0]], id=str(n)) for n in asked])
        assert [each.infer_response.id for each in got] == [str(n) for n in asked]  # each in its turn
        assert [numbers(each.infer_response) for each in got] == [[n + 1.0, 2.0] for n in asked]


async def test_a_large_answer_is_collected_and_looked_at_up_to_the_limit(triton: LocalTriton, tmp_path: Path) -> None:
    answers = {"finite": "fallback", "max_bytes": "600KiB"}
    async with serve(triton, tmp_path, answers) as running, channel_to(running.listen) as channel:
        outcome = await call(channel, infer("adder", [[NAN, *range(100_000)]]))
        assert outcome.trailers["gateway-variant"] == "old"
        assert np.isfinite(np.array(numbers(outcome.response))).all()
        assert found(running) == {"not_finite": 1}
        outcome = await call(channel, infer("adder", [[NAN, *range(200_000)]]))
        assert outcome.trailers["gateway-variant"] == "new"  # too large to be looked at
        assert found(running)["unchecked"] == 1


async def test_classes_in_place_of_numbers_are_what_their_caller_asked_for(triton: LocalTriton, tmp_path: Path) -> None:
    models = {
        "labels": {
            "variants": {"only": {"upstream": "main", "model": "classifier"}},
            "answers": {"contract": "fallback"},
        }
    }
    file = write(tmp_path / "gateway.yaml", config({"main": triton.grpc_address}, models))
    async with gateway(file) as running, channel_to(running.listen) as channel:
        request = infer("labels", [[1.0, 2.0, 3.0, 4.0]])
        request.outputs.add(name="OUT").parameters["classification"].int64_param = 2
        for _ in range(20):
            assert (await call(channel, request)).response.outputs[0].datatype == "BYTES"
            await asyncio.sleep(0.02)  # until its metadata is known, of which nobody outside can tell
        assert found(running, "only") == {"fine": 20}


@pytest.mark.parametrize("dtype", ["FP16", "BF16", "FP32", "FP64"])
async def test_every_kind_of_float_is_looked_at(triton: LocalTriton, tmp_path: Path, dtype: str) -> None:
    models = {
        "same": {
            "variants": {"only": {"upstream": "main", "model": f"identity_{dtype.lower()}"}},
            "answers": {},
        }
    }
    nan = {
        "FP16": b"\x00\x7e",
        "BF16": b"\xc0\x7f",
        "FP32": np.float32("nan").tobytes(),
        "FP64": np.float64("inf").tobytes(),
    }
    file = write(tmp_path / "gateway.yaml", config({"main": triton.grpc_address}, models))
    async with gateway(file) as running, channel_to(running.listen) as channel:
        for raw in (bytes(len(nan[dtype])), nan[dtype]):
            request = infer("same", [[0.0]])
            request.inputs[0].datatype = dtype
            request.raw_input_contents[0] = raw
            assert (await call(channel, request)).code is OK
        assert found(running, "only") == {"fine": 1, "not_finite": 1}
