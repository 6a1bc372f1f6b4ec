"""Honest callers of a gateway as a program, which check every answer: `neighbours.py PORT PID`.

PORT, PID: the gateway's. Each caller has a connection of its own and goes on for ever. For each line on stdin one comes
out: JSON of how many calls each has made since the start, what was wrong since the last line, and how long the event
loop of the gateway worked, in seconds of CPU, while a call waited at worst.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc.aio as triton
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from gateway.v1 import prediction_pb2, prediction_pb2_grpc

SECONDS = 60.0  # for a call: the machine may be busy
PAUSE = 0.05
OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
FINAL = "triton_final_response"
_unique = itertools.count(1)


class Wrong(Exception):
    """An answer came, and is not the one that was asked for."""


class Failed(Exception):
    """An answer says that there is none."""


def expect(got: Any, wanted: Any) -> None:
    if got != wanted:
        raise Wrong(f"{got!r:.300} in place of {wanted!r:.300}")


Turn = Callable[[], Awaitable[None]]
"""One call, or a few that belong together."""


def request(model: str, values: Any, datatype: str = "FP32", **fields: Any) -> Any:
    array = np.asarray(values, {"FP32": np.float32, "FP64": np.float64, "INT32": np.int32}[datatype])
    message = pb.ModelInferRequest(model_name=model, raw_input_contents=[array.tobytes()], **fields)
    message.inputs.add(name="IN", datatype=datatype, shape=array.shape)
    return message


def check(answer: Any, asked: Any, values: Any = None, version: str = "1") -> None:
    """values: of the answer, if not those of the request."""
    raw = asked.raw_input_contents[0] if values is None else np.asarray(values, np.int32).tobytes()
    expect((answer.model_name, answer.model_version, answer.id), (asked.model_name, version, asked.id))
    expect(list(answer.raw_output_contents), [raw])
    expect([list(output.shape) for output in answer.outputs], [list(asked.inputs[0].shape)])


def unary(stub: Any, model: str, datatype: str = "FP32", columns: int = 2) -> Turn:
    async def turn() -> None:
        number = next(_unique)
        asked = request(model, [[float(number)] * columns], datatype, id=f"id-{number}")
        check(await stub.ModelInfer(asked, timeout=SECONDS), asked)

    return turn


def texts(stub: Any, model: str) -> Turn:
    """Of `fails`, which has nothing to fail with, and of `words`, which has one."""

    async def turn() -> None:
        word = b"" if model.endswith("fails") else str(next(_unique)).encode()
        asked = pb.ModelInferRequest(model_name=model, id="text")
        asked.inputs.add(name="IN", datatype="BYTES", shape=[1] if model.endswith("fails") else [1, 1])
        asked.raw_input_contents.append(len(word).to_bytes(4, "little") + word)
        answer = await stub.ModelInfer(asked, timeout=SECONDS)
        expect(list(answer.raw_output_contents), list(asked.raw_input_contents))

    return turn


def versioned(stub: Any, model: str) -> Turn:
    """Two callers at once, each with a version of its own."""

    async def one(version: int) -> None:
        number = next(_unique)
        asked = request(model, [[number]], "INT32", id=str(number), model_version=str(version))
        answer = await stub.ModelInfer(asked, timeout=SECONDS)
        check(answer, asked, [[number + version]], str(version))

    async def turn() -> None:
        await asyncio.gather(one(1), one(2))

    return turn


def streamed(stub: Any, model: str) -> Turn:
    """A stream that stays open, in lock step."""
    open_: list[Any] = []

    async def turn() -> None:
        if not open_:
            open_.append(stub.ModelStreamInfer())
        try:
            number = next(_unique)
            asked = request(model, [[float(number)]], id=f"id-{number}")
            await open_[0].write(asked)
            answer = await asyncio.wait_for(open_[0].read(), SECONDS)
            if answer is grpc.aio.EOF:
                raise Failed(f"the stream ended with {await open_[0].code()} {await open_[0].details()}")
            if answer.error_message:
                raise Failed(answer.error_message)
            check(answer.infer_response, asked)
        except BaseException:
            open_.clear()
            raise

    return turn


def decoupled(stub: Any, model: str) -> Turn:
    async def turn() -> None:
        number = next(_unique)
        asked = request(model, [4], "INT32", id=str(number))

        async def once() -> AsyncIterator[Any]:
            yield asked

        answers = [answer async for answer in stub.ModelStreamInfer(once(), timeout=SECONDS)]
        if errors := [answer.error_message for answer in answers if answer.error_message]:
            raise Failed(errors[0])
        for n, answer in enumerate(answers):
            check(answer.infer_response, asked, [n])
        if len(answers) < 4 and answers and answers[-1].infer_response.parameters[FINAL].bool_param:
            return  # Triton itself has called it the last; see "An answer that ends early" in docs/errors.md
        expect(len(answers), 4)

    return turn


def sequence(stub: Any, model: str) -> Turn:
    async def turn() -> None:
        number = next(_unique)
        for step in range(4):
            asked = request(model, [[number]], "INT32", id=f"{number}-{step}")
            asked.parameters["sequence_id"].int64_param = number
            asked.parameters["sequence_start"].bool_param = step == 0
            asked.parameters["sequence_end"].bool_param = step == 3
            check(await stub.ModelInfer(asked, timeout=SECONDS), asked, [[number * (step + 1)]])

    return turn


def typed(stub: Any, model: str) -> Turn:
    async def turn() -> None:
        number = float(next(_unique))
        asked = prediction_pb2.PredictRequest(model=model)
        tensor = asked.inputs["IN"]
        tensor.datatype = "FP32"
        tensor.floats.values.append(number)
        tensor.shape[:] = [1, 1]
        answer = await stub.Predict(asked, timeout=SECONDS)
        out = answer.outputs["OUT"]
        expect(np.frombuffer(out.raw, np.float32).tolist() or list(out.floats.values), [number])

    return turn


def hedging(stub: Any, model: str) -> Turn:
    """Of two calls the first is taken, and the other one cancelled: forty a second."""

    async def pair() -> None:
        number = next(_unique)
        asked = request(model, [[float(number)]], id=f"id-{number}")
        calls = [stub.ModelInfer(asked, timeout=SECONDS) for _ in range(2)]
        done, _ = await asyncio.wait(map(asyncio.ensure_future, calls), return_when=asyncio.FIRST_COMPLETED)
        for call in calls:
            call.cancel()  # one that has ended stays as it is
        for first in done:
            check(await first, asked)

    async def turn() -> None:
        await asyncio.gather(*(pair() for _ in range(4)))

    return turn


def official(client: triton.InferenceServerClient, model: str) -> Turn:
    """NVIDIA's own client."""

    async def turn() -> None:
        values = np.full((1, 3), next(_unique), np.float32)
        tensor = triton.InferInput("IN", values.shape, "FP32")
        tensor.set_data_from_numpy(values)
        answer = await client.infer(model, [tensor], client_timeout=SECONDS)
        expect(answer.as_numpy("OUT").tolist(), values.tolist())

    return turn


def asking(stub: Any, model: str) -> Turn:
    async def turn() -> None:
        live = (await stub.ServerLive(pb.ServerLiveRequest(), timeout=SECONDS)).live
        if not live or not (await stub.ModelReady(pb.ModelReadyRequest(name=model), timeout=SECONDS)).ready:
            raise Failed("it is said not to be ready")
        expect((await stub.ModelMetadata(pb.ModelMetadataRequest(name=model), timeout=SECONDS)).name, model)

    return turn


def turns(address: str) -> dict[str, Turn]:
    """The callers by name. `identity_fp64` and `accumulate` are theirs alone."""

    def channel() -> Any:
        return grpc.aio.insecure_channel(address, OPTIONS)

    def stub() -> Any:
        return service_pb2_grpc.GRPCInferenceServiceStub(channel())

    return {
        "own name": unary(stub(), "identity_fp32"),
        "public": unary(stub(), "p-identity_fp32"),
        "merged": unary(stub(), "m-identity_fp32"),
        "merged too": unary(stub(), "m-identity_fp32"),
        "another model": unary(stub(), "p-identity_fp64", "FP64"),
        "large": unary(stub(), "p-identity_fp64", "FP64", 32 * 1024),
        "counted, merged": versioned(stub(), "m-counted"),
        "refused rows, merged": unary(stub(), "m-picky"),
        "words, merged": texts(stub(), "m-words"),
        "words, merged too": texts(stub(), "m-words"),
        "what fails for others": texts(stub(), "p-fails"),
        "what fails for others, merged": texts(stub(), "m-fails"),
        "what fails for others, own name": texts(stub(), "fails"),
        "stream": streamed(stub(), "p-identity_fp32"),
        "stream, own name": streamed(stub(), "identity_fp32"),
        "stream, merged": streamed(stub(), "m-identity_fp32"),
        "decoupled": decoupled(stub(), "p-repeat"),
        "sequence": sequence(stub(), "p-accumulate"),
        "typed": typed(prediction_pb2_grpc.PredictionServiceStub(channel()), "p-identity_fp32"),
        "hedging": hedging(stub(), "p-identity_fp32"),
        "tritonclient": official(triton.InferenceServerClient(address), "p-identity_fp32"),
        "asking": asking(stub(), "p-identity_fp32"),
    }


class Watch:
    """What is told."""

    def __init__(self, pid: int) -> None:
        self._loop = Path(f"/proc/{pid}/task/{pid}/stat")
        self.calls: Counter[str] = Counter()
        self.faults: list[dict[str, Any]] = []
        self.longest = 0.0

    def work(self) -> float:
        """Seconds of CPU of the gateway's main thread."""
        fields = self._loop.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def go_on(self, name: str, turn: Turn) -> None:
        while True:
            before = self.work()
            try:
                await turn()
            except grpc.aio.AioRpcError as error:
                self.fault(name, f"{error.code().name} {error.details()}"[:400], wrong=False)
            except (Failed, triton.InferenceServerException, asyncio.TimeoutError) as error:
                self.fault(name, f"{type(error).__name__} {error}"[:400], wrong=False)
            except Wrong as error:
                self.fault(name, str(error), wrong=True)
            else:
                self.calls[name] += 1
            self.longest = max(self.longest, self.work() - before)
            await asyncio.sleep(PAUSE)

    def fault(self, name: str, what: str, *, wrong: bool) -> None:
        self.faults.append({"who": name, "what": what, "wrong": wrong, "at": time.time()})

    def tell(self) -> str:
        told = json.dumps({"calls": self.calls, "faults": self.faults, "longest": self.longest})
        self.faults, self.longest = [], 0.0
        return told


async def main(port: int, pid: int) -> None:
    watch = Watch(pid)
    tasks = [asyncio.create_task(watch.go_on(*each)) for each in turns(f"127.0.0.1:{port}").items()]
    while await asyncio.to_thread(sys.stdin.readline):
        for task in tasks:
            if task.done():
                task.result()  # raises what was not foreseen
        print(watch.tell(), flush=True)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
