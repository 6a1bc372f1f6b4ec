"""What pipelines' requests hold is bounded, whatever waits for a thread or a model, and all of it is given back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from gateway.errors import GatewayError, Overloaded
from gateway.hooks import CallObserver, NoObserver
from gateway.infer.exchange import Reply, Request
from gateway.infer.messages import build_request, build_response
from gateway.infer.pipelines import PipelineModel
from gateway.infer.room import MIB, Room
from gateway.infer.threads import Threads
from gateway.stages import PipelineSpec, build_pipeline
from gateway.types import Served

TENSOR = {"name": "x", "datatype": "FP32", "shape": [-1]}
DECLARED = PipelineSpec.model_validate({"inputs": [TENSOR], "outputs": [TENSOR], "steps": [{"call": "m"}]})


def request(mib: int) -> Request:
    return Request(build_request("p", {"x": np.zeros((1, mib * MIB // 4), np.float32)}))


def model_of(room: Room, before_answer: Callable[[], object]) -> PipelineModel:
    async def call(asked: Request, observer: CallObserver) -> Reply:
        await before_answer()  # type: ignore[misc]
        made = {"x": ("FP32", np.zeros((1, MIB // 4), np.float32))}
        return Reply(build_response("m", "1", "", made), (), (), Served("m", "v", "1", "a:1", 1))

    threads = Threads(1, 1)
    threads.room = room
    return PipelineModel(build_pipeline("p", DECLARED, lambda _: b""), threads, call, lambda _: True)


async def test_requests_that_wait_for_a_model_are_counted_until_they_are_answered() -> None:
    room, answer = Room(40 * MIB), asyncio.Event()
    model = model_of(room, answer.wait)
    waiting = [asyncio.ensure_future(model.infer(request(4), NoObserver())) for _ in range(3)]
    await asyncio.sleep(0)
    assert 36 * MIB <= room.held < 37 * MIB, "a message, its parsed form, and what is sent on"
    with pytest.raises(Overloaded, match=r"hold 36 MiB, and this one takes 12\.0 more; 40 are there"):
        await model.infer(request(4), NoObserver())
    answer.set()
    await asyncio.gather(*waiting)
    assert room.held == 0


async def test_one_that_is_alone_gets_in_whatever_its_size() -> None:
    room = Room(1 * MIB)

    async def at_once() -> None:
        assert room.held > 6 * MIB

    await model_of(room, at_once).infer(request(2), NoObserver())
    assert room.held == 0


@pytest.mark.parametrize("error", [Overloaded("full"), RuntimeError("a bug"), asyncio.CancelledError()])
async def test_whatever_ends_a_request_gives_back_what_it_held(error: BaseException) -> None:
    room = Room(100 * MIB)

    async def fail() -> None:
        raise error

    with pytest.raises((GatewayError, asyncio.CancelledError)):
        await model_of(room, fail).infer(request(1), NoObserver())
    assert room.held == 0
