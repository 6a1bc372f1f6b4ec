"""`python -m perf.trace`: what one call runs through in the gateway, as numbers of Python calls.

For each kind of call: the functions of the gateway that are called on the event loop; how often the next one is of
another room (package) than the one before, with the transport's three rooms as one and each by itself; and how often
routing is asked for a plan or a draw. It runs the sources, whatever is compiled, in front of a real Triton. Each figure
is that of the shortest of many alike calls, so that no probe or timer is in it. Clients have threads of their own,
which are not counted. `-v` lists the functions.
"""

from __future__ import annotations

import os

os.environ["GATEWAY_NO_EXTENSIONS"] = "1"  # before the gateway is imported: native functions are not seen

import asyncio
import io
import queue
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
import numpy as np
import yaml
from PIL import Image
from tritonclient.grpc import service_pb2 as pb

import gateway as package
from gateway.app import Gateway, Place
from gateway.config import load
from perf import gateways, models
from perf.stack import Stack, until_ready

_ROOT = str(Path(package.__file__).parent) + os.sep
_TIMES = 40
_MEMBERS = 16  # calls at once, where they are merged
_SERVICE = "/inference.GRPCInferenceService/"
_VALUES = frozenset({"bounded", "deadline", "errors", "hooks", "status", "types"})  # to make one is to enter no room
_TRANSPORT = frozenset({"http2", "rpc", "transport"})


@dataclass(slots=True)
class Trace:
    """What was called, function by function, each with its room."""

    called: list[tuple[str, str]]

    @property
    def calls(self) -> int:
        return len(self.called)

    def changes(self, *, transport_is_one: bool) -> int:
        """How often the function called next is of another room than the one called before."""
        rooms = [room for room, _ in self.called if room not in _VALUES]
        if transport_is_one:
            rooms = ["transport" if room in _TRANSPORT else room for room in rooms]
        return sum(a != b for a, b in pairwise(rooms))

    @property
    def routing(self) -> int:
        """How often routing is asked for a plan."""
        return sum(name in ("choose", "drawn", "plan") for room, name in self.called if room == "routing")

    def watch(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            room = _room_of(frame)
            if room:
                self.called.append((room, frame.f_code.co_name))


def _room_of(frame: FrameType) -> str:
    """ "" of code that is none of the gateway's."""
    file = frame.f_code.co_filename
    return file.removeprefix(_ROOT).split(os.sep)[0].removesuffix(".py") if file.startswith(_ROOT) else ""


Act = Callable[[grpc.Channel], None]


def _tiny() -> bytes:
    request = pb.ModelInferRequest(model_name=gateways.TINY)
    request.inputs.add(name="x", datatype="FP32", shape=[1, models.TINY])
    request.raw_input_contents.append(np.zeros(models.TINY, np.float32).tobytes())
    return bytes(request.SerializeToString())


def _photo() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (300, 300), "teal").save(file, "JPEG")
    request = pb.ModelInferRequest(model_name=gateways.PHOTO)
    request.inputs.add(name="image", datatype="BYTES", shape=[1, 1])
    request.raw_input_contents.append(len(file.getvalue()).to_bytes(4, "little") + file.getvalue())
    return bytes(request.SerializeToString())


def _unary(body: bytes, at_once: int = 1) -> Act:
    def act(channel: grpc.Channel) -> None:
        call = channel.unary_unary(_SERVICE + "ModelInfer")
        for answer in [call.future(body) for _ in range(at_once)]:
            assert answer.result()

    return act


class _Stream:
    """One that stays open: each act is one message and its answer."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._sent: Any = None
        self._answers: Iterator[bytes] | None = None

    def __call__(self, channel: grpc.Channel) -> None:
        if self._answers is None:
            self._sent = queue.SimpleQueue()
            self._answers = channel.stream_stream(_SERVICE + "ModelStreamInfer")(iter(self._sent.get, None))
        self._sent.put(self._body)
        answer = pb.ModelStreamInferResponse.FromString(next(self._answers))
        assert not answer.error_message, answer.error_message


async def _traced(act: Act, channel: grpc.Channel) -> Trace:
    """The shortest of many traces of an act."""
    loop = asyncio.get_running_loop()
    found: list[Trace] = []
    with ThreadPoolExecutor(1) as pool:
        for _ in range(_TIMES):
            trace = Trace([])
            done = loop.run_in_executor(pool, act, channel)
            sys.setprofile(trace.watch)
            try:
                await done
                await asyncio.sleep(0.02)  # what is done after the answer is out
            finally:
                sys.setprofile(None)
            found.append(trace)
    return min(found, key=lambda trace: trace.calls)


async def _figures(stack: Stack, folder: Path, *, merge: bool) -> None:
    file = folder / "traced.yaml"
    settings = gateways.config(stack.triton.port, merge=merge)
    settings |= {"listen": "127.0.0.1:0", "admin": {"listen": "127.0.0.1:0"}}
    settings["telemetry"] = {"access_log": {"destination": "none"}}
    file.write_text(yaml.safe_dump(settings))
    loaded = load(file, {})
    async with Gateway(loaded, lambda: loaded, {}, Place(loaded.config.admin.listen)) as running:
        await asyncio.to_thread(until_ready, running.listen, [gateways.TINY])
        with grpc.insecure_channel(running.listen) as channel:
            if merge:
                await _tell("merged", _unary(_tiny(), _MEMBERS), channel, _MEMBERS)
                return
            await _tell("unary", _unary(_tiny()), channel)
            await _tell("stream message", _Stream(_tiny()), channel)
            await _tell("pipeline", _unary(_photo()), channel)


async def _tell(kind: str, act: Act, channel: grpc.Channel, calls: int = 1) -> None:
    trace = await _traced(act, channel)
    changes = [trace.changes(transport_is_one=is_one) for is_one in (True, False)]
    figures = (trace.calls, *changes, trace.routing)
    print(f"{kind:16}" + "".join(f"{figure / calls:12.4g}" for figure in figures), flush=True)
    if "-v" in sys.argv:
        for room, name in trace.called:
            print(f"    {room:12} {name}")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="inference-gateway-trace-") as folder, Stack(Path(folder)) as stack:
        print(f"{'one call':16}{'calls':>12}{'changes':>12}{'of all':>12}{'routing':>12}")
        for merge in (False, True):
            asyncio.run(_figures(stack, Path(folder), merge=merge))


if __name__ == "__main__":
    main()
