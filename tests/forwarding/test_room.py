"""What pipelines' requests hold is bounded, whatever waits for a thread or a model, and all of it is given back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from gateway.errors import GatewayError, Overloaded
from gateway.forwarding import messages, pipelines
from gateway.forwarding.exchange import Reply, Request
from gateway.forwarding.messages import build_request, build_response
from gateway.forwarding.pipelines import PipelineModel
from gateway.forwarding.room import MIB, Room
from gateway.forwarding.threads import Threads
from gateway.hooks import CallObserver, NoObserver
from gateway.steps import PipelineSpec, build_pipeline
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


async def test_a_large_request_keeps_no_small_one_out_and_small_ones_no_large_one() -> None:
    room = Room(64 * MIB)
    small = [room.share() for _ in range(9)]
    for each in small[:8]:
        each.take(MIB)
    page = room.share()
    page.take(80 * MIB)  # it is alone among large ones
    with pytest.raises(Overloaded, match=r"hold 88 MiB, and this one takes 1\.0 more; 64 are there"):
        small[8].take(MIB)  # small ones have used up their eighth
    small[0].leave(MIB)
    small[8].take(MIB)
    with pytest.raises(Overloaded):
        room.share().take(5 * MIB)
    with pytest.raises(Overloaded):
        small[1].take(4 * MIB)  # it would not be small any more
    page.grow(MIB)
    for each in (page, *small):
        each.leave(each.held)
    assert (room.held, room.large) == (0, 0)


async def test_texts_are_weighed_off_the_loop_and_paid_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    loop_thread, on_loop, paid = threading.get_ident(), [], []
    room, tensors_of = Room(64 * MIB), pipelines.tensors_of
    weigh = messages.weigh

    def weighing(*args: Any) -> int:
        on_loop.append(threading.get_ident() == loop_thread)
        return weigh(*args)

    def making(*args: Any) -> Any:
        paid.append(room.held)
        return tensors_of(*args)

    monkeypatch.setattr(messages, "weigh", weighing)
    monkeypatch.setattr(pipelines, "tensors_of", making)
    model = model_of(room, asyncio.Event().wait)
    body = build_request("p", {"x": np.full((1, 100_000), b"", object)})
    typed = pb.ModelInferRequest(model_name="p")
    typed.inputs.add(name="x", datatype="BYTES", shape=[1, 100_000]).contents.bytes_contents.extend([b""] * 100_000)
    for sent in (body, typed.SerializeToString()):
        with pytest.raises(GatewayError):  # the pipeline takes no texts
            await model.infer(Request(sent), NoObserver())
    assert min(paid) >= 100_000 * 320
    assert on_loop == [False], "raw contents have nothing to weigh"
    room.share().take(40 * MIB)
    with pytest.raises(Overloaded):
        await model.infer(Request(body), NoObserver())
    assert len(paid) == 2
    assert room.held == 40 * MIB


@pytest.mark.parametrize("error", [Overloaded("full"), RuntimeError("a bug"), asyncio.CancelledError()])
async def test_whatever_ends_a_request_gives_back_what_it_held(error: BaseException) -> None:
    room = Room(100 * MIB)

    async def fail() -> None:
        raise error

    with pytest.raises((GatewayError, asyncio.CancelledError)):
        await model_of(room, fail).infer(request(1), NoObserver())
    assert room.held == 0
