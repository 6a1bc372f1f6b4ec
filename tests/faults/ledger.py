"""The ledger: every call has an id, ends once with a status, in time, with its own bytes, and is executed once at most.

It is kept by the callers; `check` compares it with the books of the servers that executed (`scripted_triton`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from scripted_triton import answer_to, tensor_of
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

LATE = 0.5  # seconds after its deadline that a call may end, of bar D
BUSY = 30.0  # more, on a machine that many tests share: what only a hang takes
OK = grpc.StatusCode.OK


@dataclass
class Entry:
    """One call. Instants are of `time.monotonic()`."""

    began: float
    deadline: float
    ended: list[tuple[float, grpc.StatusCode, str]] = field(default_factory=list)
    wrong: bytes | None = None  # that came in place of its answer
    attempts: int = 1  # as the gateway tells

    @property
    def code(self) -> grpc.StatusCode:
        return self.ended[0][1]


LARGE = 192 << 10  # bytes of a tensor that is laid into memory which server and gateway share, if they do


def request(id_: str, model: str = "m", size: int = 32) -> Any:
    """size: bytes of its tensor."""
    asked = pb.ModelInferRequest(model_name=model, id=id_, raw_input_contents=[tensor_of(id_, size)])
    asked.inputs.add(name="IN", datatype="UINT8", shape=[size])
    return asked


class Ledger:
    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self._ids = map("call-{}".format, itertools.count())

    def begin(self, timeout: float) -> str:
        id_ = next(self._ids)
        now = time.monotonic()
        self.entries[id_] = Entry(now, now + timeout)
        return id_

    def end(self, id_: str, code: grpc.StatusCode, text: str = "", answer: bytes | None = None) -> None:
        entry = self.entries[id_]
        entry.ended.append((time.monotonic(), code, text))
        if code is OK and answer != answer_to(id_):
            entry.wrong = answer or b""

    # What it says

    def failed(self, since: float = 0.0, given: float = 0.0) -> Counter[str]:
        """Of the calls that began since then, and had at least so many seconds."""
        return Counter(
            f"{code.name}: {text}"
            for entry in self.entries.values()
            if entry.began >= since and entry.deadline - entry.began >= given
            for _, code, text in entry.ended[:1]
            if code is not OK
        )

    def good(self, since: float = 0.0) -> int:
        return sum(entry.began >= since and bool(entry.ended) and entry.code is OK for entry in self.entries.values())

    def _whose(self, answer: bytes) -> str:
        return next((f"the answer to {id_}" for id_ in self.entries if answer_to(id_) == answer), repr(answer))

    def check(self, books: Iterable[Path]) -> None:
        """books: what each server has executed. A call that was tried once is executed once at most."""
        executed = Counter(id_ for book in books if book.exists() for id_ in book.read_text().split())
        assert executed.keys() <= self.entries.keys(), "what nobody asked for was executed"
        for id_, entry in self.entries.items():
            assert len(entry.ended) == 1, f"{id_} ended {len(entry.ended)} times"
            assert entry.wrong is None, f"{id_} got {self._whose(entry.wrong)}"
            at, code, text = entry.ended[0]
            assert at <= entry.deadline + LATE + BUSY, f"{id_} ended {at - entry.deadline:.2f} s late: {code} {text}"
            assert executed[id_] <= entry.attempts, f"{id_} was executed {executed[id_]} times: {code} {text}"
            assert executed[id_] >= (code is OK), f"{id_} was answered and never executed"


class Callers:
    """Make calls through a channel until told to stop, each in the ledger."""

    def __init__(self, ledger: Ledger, timeout: float, pause: float, size: int) -> None:
        self.ledger = ledger
        self._size = size
        self._timeout = timeout
        self._pause = pause
        self.going = True

    async def unary(self, stub: Any) -> None:
        while self.going:
            await self.once(stub)
            await asyncio.sleep(self._pause)

    async def once(self, stub: Any) -> None:
        id_ = self.ledger.begin(self._timeout)
        call = stub.ModelInfer(request(id_, size=self._size), timeout=self._timeout)
        try:
            answer = await call
            self.ledger.end(id_, OK, "", answer.raw_output_contents[0])
        except grpc.aio.AioRpcError as error:
            self.ledger.end(id_, error.code(), str(error.details()))
        told = dict(await call.trailing_metadata() or ())
        self.ledger.entries[id_].attempts = int(told.get("gateway-attempts", 3))

    async def stream(self, stub: Any) -> None:
        """Streams of five messages in lock step; each message is a call of its own in the ledger."""
        while self.going:
            streaming = stub.ModelStreamInfer(timeout=self._timeout)
            for _ in range(5):
                if not await self._message(streaming):
                    break
                await asyncio.sleep(self._pause)
            else:
                with contextlib.suppress(Exception):  # grpcio's many for a stream that broke, whose calls have ended
                    await streaming.done_writing()
                    while await streaming.read() is not grpc.aio.EOF:
                        pass

    async def _message(self, streaming: Any) -> bool:
        """Answers whether the stream goes on."""
        id_ = self.ledger.begin(self._timeout)
        self.ledger.entries[id_].attempts = 3  # a stream says nothing of one message's
        try:
            await streaming.write(request(id_))
            answer = await streaming.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            answer = grpc.aio.EOF
        if answer is grpc.aio.EOF:
            code = await streaming.code()
            code = grpc.StatusCode.UNKNOWN if code is OK else code
            self.ledger.end(id_, code, f"stream: {await streaming.details()}")
            return False
        if answer.error_message:
            self.ledger.end(id_, grpc.StatusCode.UNKNOWN, f"stream: {answer.error_message}")
        else:
            self.ledger.end(id_, OK, "", answer.infer_response.raw_output_contents[0])
        return True


OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 500)]


@contextlib.asynccontextmanager
async def calling(
    target: str,
    ledger: Ledger,
    *,
    unary: int = 4,
    streams: int = 0,
    timeout: float = 60.0,
    pause: float = 0.01,
    size: int = 32,
) -> AsyncIterator[Callers]:
    """Calls while the block lasts, through a channel per caller. target: as grpcio takes it; more than one address is
    balanced by round_robin. size: bytes of the tensor of a unary call.
    """
    options = [*OPTIONS, ("grpc.lb_policy_name", "round_robin")]
    callers = Callers(ledger, timeout, pause, size)
    async with contextlib.AsyncExitStack() as exits:
        tasks = []
        for run in [callers.unary] * unary + [callers.stream] * streams:
            channel = await exits.enter_async_context(grpc.aio.insecure_channel(target, options))
            tasks.append(asyncio.ensure_future(run(service_pb2_grpc.GRPCInferenceServiceStub(channel))))
        try:
            yield callers
        finally:
            callers.going = False
            await asyncio.gather(*tasks)
