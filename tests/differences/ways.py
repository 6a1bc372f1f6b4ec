"""The ways to one Triton's models, and when two answers count as the same.

Every way is asked by real grpcio clients. A public model's answer is compared under the model's own name. What may
differ besides is `ALLOWED`, which mirrors the table "Where answers differ from Triton's own" in docs/errors.md.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from drawn_requests import MODELS, Asked
from patience import wait_until
from tritonclient.grpc import service_pb2 as pb
from v2_calls import Outcome, batch_of, call, channels_to, stream
from v2_gateways import endpoint_of, gateway_of, transparent_to

from gateway.config import load

CALLERS = 4  # connections of each way
SECONDS = 60.0  # for one call: the machine may be busy
PUBLIC = {name: f"p-{name}" for name in MODELS if name.isascii()}  # a config names others not
MERGED = {name: f"m-{name}" for name in PUBLIC}


@dataclass
class Way:
    """One of the ways, by its connections. names: public names by the models' own; empty if they are called so."""

    name: str
    channels: Sequence[grpc.aio.Channel] = field(repr=False)
    names: dict[str, str] = field(default_factory=dict, repr=False)
    largest_batch: int = 1  # seen on it

    def name_of(self, model: str) -> str:
        return self.names.get(model, model)

    def own_of(self, called: str) -> str:
        return next((own for own, name in self.names.items() if name == called), called)

    async def ask(self, asked: Asked, caller: int = 0) -> Outcome:
        """One ModelInfer."""
        request = asked.to(self.name_of(asked.message.model_name))
        channel = self.channels[caller % len(self.channels)]
        outcome = await call(channel, request, metadata=asked.metadata, timeout=SECONDS, compression=asked.compression)
        self.largest_batch = max(self.largest_batch, batch_of(outcome))
        return outcome

    async def ask_all(self, round_: Iterable[Asked]) -> list[Outcome]:
        """At the same time, by several callers."""
        return await asyncio.gather(*(self.ask(asked, caller) for caller, asked in enumerate(round_)))

    async def stream_all(self, round_: Iterable[Asked], metadata: Any = ()) -> Streamed:
        """On one ModelStreamInfer."""
        streaming = stream(self.channels[0], metadata, SECONDS)
        for asked in round_:
            await streaming.write(asked.to(self.name_of(asked.message.model_name)))
        await streaming.done_writing()
        answers: dict[str, list[Any]] = defaultdict(list)
        with contextlib.suppress(grpc.aio.AioRpcError):  # the code tells
            while (answer := await streaming.read()) is not grpc.aio.EOF:
                answers[answer.infer_response.id].append(answer)
        return Streamed(await streaming.code(), await streaming.details() or "", answers)


@dataclass
class Streamed:
    """How a stream ended, and what came before, by the requests' ids: requests that have one id may be answered in
    any order."""

    code: grpc.StatusCode
    text: str
    answers: dict[str, list[Any]]

    def under(self, way: Way) -> tuple[object, ...]:
        """The same for every way."""
        told = {id_: sorted(_one(answer, way) for answer in each) for id_, each in self.answers.items()}
        return self.code, self.text, told


def _one(answer: Any, way: Way) -> tuple[str, bytes]:
    text, called = answer.error_message, answer.infer_response.model_name
    for own, name in way.names.items():
        text = text.replace(f"'{name}'", f"'{own}'")
    return text, _renamed(answer.infer_response, way.own_of(called), called)


def _renamed(response: Any, own: str, called: str) -> bytes:
    """A response's bytes, its maps in one order, under the model's own name."""
    if response.model_name == called:
        response.model_name = own
    return bytes(response.SerializeToString(deterministic=True))


def under(outcome: Outcome, own: str, called: str) -> tuple[object, ...]:
    """Code, text and answer of a unary call as one to the model's own name has them. Besides, an answer has nothing
    in its metadata but who answered which request."""
    said = {key for key, _ in (*outcome.initial, *outcome.trailing) if not key.startswith(("gateway-", "x-request-id"))}
    body = _renamed(outcome.response, own, called) if outcome.body else b""
    return outcome.code, outcome.text.replace(called, own), body, said


# What may differ


@dataclass(frozen=True)
class Pair:
    """Two outcomes of one request that are not the same."""

    asked: Asked
    direct: Outcome
    through: Outcome
    way: Way

    def codes(self) -> tuple[str, str]:
        return self.direct.code.name, self.through.code.name


QUEUE = ("Exceeds maximum queue size", "Request timeout expired")


def _is_overload(pair: Pair) -> bool:
    full = pair.direct.text.endswith(QUEUE) and pair.through.text.endswith(pair.direct.text)
    return bool(pair.way.names) and full and pair.codes() == ("UNAVAILABLE", "RESOURCE_EXHAUSTED")


def _is_no_message(pair: Pair) -> bool:
    return pair.codes() == ("INTERNAL", "INTERNAL") and pair.direct.text == "Unable to parse request"


def _is_space_at_an_edge(pair: Pair) -> bool:
    reset = "RST_STREAM with error code 1" in pair.through.text
    return reset and any(isinstance(value, str) and value != value.strip() for _, value in pair.asked.metadata)


def _is_control(pair: Pair) -> bool:
    return pair.through.code is grpc.StatusCode.PERMISSION_DENIED and "server.control" in pair.through.text


def _is_seen(pair: Pair) -> bool:
    """Looked for where answers are compared, not here."""
    return False


ALLOWED: dict[str, Callable[[Pair], bool]] = {
    "names": _is_seen,
    "who answered": _is_seen,
    "ids in merged requests": _is_seen,
    "ids on streams": _is_seen,
    "a full queue": _is_overload,
    "bytes that are no message": _is_no_message,
    "large messages": _is_seen,
    "metadata with a space at an edge": _is_space_at_an_edge,
    "RPCs that change a server": _is_control,
    "what there is": _is_seen,
    "health": _is_seen,
    "long names": _is_seen,
}
"""By the words of the table's first column."""


async def same(asked: Asked, through: Outcome, way: Way, direct: Way) -> str:
    """What is different about an answer and may not be; "" if nothing is."""
    own = asked.message.model_name
    called = way.name_of(own)
    expected = await direct.ask(asked)
    want, got = under(expected, own, own), under(through, own, called)
    if want == got or any(is_so(Pair(asked, expected, through, way)) for is_so in ALLOWED.values()):
        return ""
    if batch_of(through) > 1 and asked.message.id and got == await _without_its_id(asked, direct):
        return ""
    return f"{way.name}, batch of {batch_of(through)}: {_told(got)}\n  in place of {_told(want)}\n  for {asked}"


async def _without_its_id(asked: Asked, direct: Way) -> tuple[object, ...]:
    """What Triton answers to a request that came without its id, given back with it: row "ids in merged requests"."""
    anonymous = asked.to(asked.message.model_name)
    anonymous.id = ""
    outcome = await direct.ask(Asked(anonymous, asked.metadata))
    response = outcome.response
    response.id = asked.message.id
    own = asked.message.model_name
    return (*under(outcome, own, own)[:2], _renamed(response, own, own), set())


def _told(seen: tuple[object, ...]) -> str:
    return " ".join(str(part)[:300] for part in seen)


# Where they lead to


_FRONT = """
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
telemetry: {{access_log: {{destination: none}}}}
upstreams: {{main: {{endpoints: ["{address}"], probe_interval: 500ms}}}}
direct: {{models: all}}
{more}
models:
"""
_PLAIN = "  {name}: {{variants: {{only: {{upstream: main, model: {model}}}}}}}\n"
_MERGING = "  {name}: {{variants: {{only: {{upstream: main, model: {model}}}}}, merge: {merge}}}\n"


@contextlib.asynccontextmanager
async def direct_to(address: str) -> AsyncIterator[Way]:
    async with channels_to(address, CALLERS) as channels:
        yield Way("directly", channels)


@contextlib.asynccontextmanager
async def transparent(address: str) -> AsyncIterator[Way]:
    """Through `serve --triton`."""
    async with transparent_to(address) as gateway, channels_to(gateway.listen, CALLERS) as channels:
        yield Way("transparent", channels)


_SHARING = """
listen: 127.0.0.1:0
admin: {{listen: "127.0.0.1:0"}}
server: {{control: all}}
telemetry: {{access_log: {{destination: none}}}}
upstreams: {{main: {{endpoints: ["{address}"], shared_memory: auto}}}}
direct: {{models: all}}
"""


@contextlib.asynccontextmanager
async def sharing(folder: Path, address: str) -> AsyncIterator[Way]:
    """As `transparent`, but each tensor that can be is laid into memory that Triton shares, however small it is."""
    file = folder / "sharing.yaml"
    file.write_text(_SHARING.format(address=address))
    async with gateway_of(load(file, {})) as gateway, channels_to(gateway.listen, CALLERS) as channels:
        memory = endpoint_of(gateway, "main").memory
        assert memory is not None
        await wait_until(lambda: memory.now().state == "in use")
        memory.least = 1
        yield Way("in shared memory", channels)
        requests = memory.now().requests
        assert not requests or requests.get("placed"), "all went as bytes"
        # A model's error in words that may be a proxy's retires a region; another one follows.
        assert set(memory.now().registrations) <= {"registered", "refused", "retired", "unregistered"}
        assert memory.now().taken == 0


@contextlib.asynccontextmanager
async def public(
    folder: Path, address: str, models: Iterable[str] = PUBLIC, *, merge: str = "{ignore_ids: true}", more: str = ""
) -> AsyncIterator[tuple[Way, Way]]:
    """Through a public model of each, without and with `merge`, which is settled when this is entered."""
    file = folder / "gateway.yaml"
    lines = [_PLAIN.format(name=PUBLIC[model], model=model) for model in models]
    lines += [_MERGING.format(name=MERGED[model], model=model, merge=merge) for model in models]
    file.write_text(_FRONT.format(address=address, more=more) + "".join(lines))
    async with gateway_of(load(file, {})) as gateway, channels_to(gateway.listen, CALLERS) as channels:
        yield Way("public", channels, PUBLIC), Way("merged", channels, MERGED)


def simple(model: str, values: list[int], **fields: Any) -> Asked:
    """One INT32 column."""
    message = pb.ModelInferRequest(model_name=model, **fields)
    message.inputs.add(name="IN", datatype="INT32", shape=[len(values), 1])
    message.raw_input_contents.append(b"".join(value.to_bytes(4, "little", signed=True) for value in values))
    return Asked(message)
