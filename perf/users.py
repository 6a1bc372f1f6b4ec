"""Calls of many users in a closed loop: `python -m perf.users ADDRESS MODEL SECONDS CALLERS USERS [RATE]`.

With a RATE the loop is open: so many calls a second, whether others are answered or not.

On the gateway's own transport, which costs a fifth of what Google's library does, so that the gateway is what is busy.
No call has a deadline, as perf_analyzer's have none: the heads of a user's calls are equal. Prints JSON: answers per
second (`rate`), their number (`answers`), and how many calls failed, by what was said (`failed`).
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import uvloop
from tritonclient.grpc import service_pb2 as pb

from gateway.http2.hpack import NeverIndexed
from gateway.rpc.client import ClientCall
from gateway.transport.dialer import ChannelOptions, WireChannel

_INFER = b"/inference.GRPCInferenceService/ModelInfer"


def request(model: str) -> bytes:
    asked = pb.ModelInferRequest(model_name=model, raw_input_contents=[bytes(32)])
    asked.inputs.add(name="x", datatype="FP32", shape=[1, 8])
    return bytes(asked.SerializeToString())


class Users:
    """Each of `callers` sends its next request once the last one is answered; requests are of each user in turn."""

    def __init__(self, channel: WireChannel, model: str, users: int) -> None:
        self._channel = channel
        self._body = request(model)
        self._fields = [(NeverIndexed(b"x-user-id", b"user-%d" % number),) for number in range(users)]
        self._number = 0
        self._open = 0
        self._until = 0.0
        self._done: asyncio.Future[None]
        self.answers = 0
        self.failed: dict[str, int] = {}

    async def call(self, seconds: float, callers: int) -> None:
        loop = asyncio.get_running_loop()
        self._done, self._until, self._open = loop.create_future(), time.monotonic() + seconds, callers
        for _ in range(callers):
            self._next()
        await self._done

    async def come(self, seconds: float, rate: float) -> None:
        loop = asyncio.get_running_loop()
        self._done, self._until, began = loop.create_future(), 0.0, time.monotonic()
        self._open = 1  # this one
        while (elapsed := time.monotonic() - began) < seconds:
            while self._number < rate * elapsed:
                self._open += 1
                self._next()
            await asyncio.sleep(0.002)
        self._open -= 1
        if self._open:
            await self._done

    def _next(self) -> None:
        call = self._channel.call(_INFER, self._fields[self._number % len(self._fields)])
        self._number += 1
        call.request = self._body
        call.on_done = self._ended
        self._channel.submit(call, wait_for_ready=True)

    def _ended(self, call: ClientCall) -> None:
        if call.code:
            self.failed[call.text] = self.failed.get(call.text, 0) + 1
        else:
            self.answers += 1
        if time.monotonic() < self._until:
            self._next()
            return
        self._open -= 1
        if not self._open:
            self._done.set_result(None)


async def main(address: str, model: str, seconds: str, callers: str, users: str, rate: str = "") -> None:
    async with WireChannel(address, ChannelOptions(connections=4, together=8)) as channel:
        load, began = Users(channel, model, int(users)), time.monotonic()
        await (load.come(float(seconds), float(rate)) if rate else load.call(float(seconds), int(callers)))
        answered = load.answers / (time.monotonic() - began)
    print(json.dumps({"rate": answered, "answers": load.answers, "failed": load.failed}))


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
