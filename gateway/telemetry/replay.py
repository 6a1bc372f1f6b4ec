"""Telemetry: sends captured requests again, to a server of the V2 protocol. `capture` writes what this reads.

May depend on fsspec, grpc, `v2` and the names of metadata. Requests go out in the order of the file, a given number at
a time. Their metadata says that they are replayed, so that a gateway does not capture them again, and does not count
them as traffic of their model.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import fsspec
import grpc

from gateway.errors import Misused
from gateway.forwarding.metadata import REPLAYED
from gateway.v2.names import INFER
from gateway.v2.peek import tail

_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class BadCapture(Misused):
    """The file is not a capture; the text says where."""


@dataclass(frozen=True, slots=True)
class Captured:
    """One captured request."""

    model: str
    body: bytes  # an encoded ModelInferRequest
    metadata: Mapping[str, str]


@dataclass
class Replayed:
    """The results of a replay."""

    codes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # duration of each call
    first_error: str = ""
    took: float = 0.0

    def lines(self) -> Iterator[str]:
        """The results as lines of text."""
        total = self.codes.total()
        yield f"{total} requests in {self.took:.2f} s ({total / self.took if self.took else 0:.0f}/s)"
        for code, count in self.codes.most_common():
            yield f"  {code:20} {count}"
        if self.seconds:
            ordered = sorted(self.seconds)
            p50, p99 = (ordered[min(len(ordered) - 1, int(len(ordered) * q))] for q in (0.5, 0.99))
            yield f"  half within {p50 * 1000:.1f} ms, 99 of 100 within {p99 * 1000:.1f} ms"
        if self.first_error:
            yield f"  first error: {self.first_error}"


_NOT_KEPT = "the request was not kept; `request: true` below the shadow's `keep` keeps those of up to `max_bytes`"


def read(url: str) -> Iterator[Captured]:
    """The requests of a captured file. url: a path, or any URL that fsspec can open.

    It is read to the end that it has now. A last line without its end is left out: the file is being written, or its
    writer was killed.

    :raises BadCapture: if a line is not a captured request.
    """
    fs, path = fsspec.core.url_to_fs(url)
    left = fs.size(path)
    with fs.open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            left -= len(line)
            if left < 0 or not line.endswith(b"\n"):
                return
            try:
                kept = json.loads(line)
                if "request_sha256" in kept and "request" not in kept:
                    raise BadCapture(f"{url}, line {number}: {_NOT_KEPT}")
                yield Captured(kept["model"], base64.b64decode(kept["request"], validate=True), dict(kept["metadata"]))
            except (ValueError, KeyError, TypeError, binascii.Error) as error:
                raise BadCapture(f"{url}, line {number}: is not a captured request ({type(error).__name__})") from error


async def replay(
    files: Sequence[str],
    to: str,
    *,
    at_once: int = 1,
    model: str | None = None,
    instead: str | None = None,
    timeout: float = 60.0,
    as_traffic: bool = False,
    key: str = "",
) -> Replayed:
    """Send every request of the files.

    to:          HOST:PORT, without TLS.
    at_once:     calls in flight.
    model:       send only requests of this model; None sends all.
    instead:     the model to ask, at its newest version, in place of that which callers named; None asks that one.
    timeout:     seconds for each call.
    as_traffic:  count them, in metrics and captures, as if callers had sent them.
    key:         an API key or token that the gateway lets in; captures have none.
    :raises BadCapture: if a file is not a capture; the requests before the fault have been sent.
    """
    result = Replayed()
    requests = (each for file in files for each in read(file) if model in (None, each.model))
    renamed = b"" if instead is None else tail(instead, "")  # versions of a public name aren't those of another model
    marks = [] if as_traffic else [(REPLAYED, "1")]
    if key:
        marks.append(("authorization", f"Bearer {key}"))
    began = time.monotonic()
    async with grpc.aio.insecure_channel(to, _UNLIMITED) as channel:
        infer = channel.unary_unary(INFER)

        async def send_some() -> None:
            for request in requests:  # all senders share the iterator
                await _send(infer, request.body + renamed, [*request.metadata.items(), *marks], timeout, result)

        await asyncio.gather(*(send_some() for _ in range(at_once)))
    result.took = time.monotonic() - began
    return result


async def _send(
    infer: grpc.aio.UnaryUnaryMultiCallable,
    body: bytes,
    metadata: Sequence[tuple[str, str]],
    timeout: float,
    result: Replayed,
) -> None:
    began = time.monotonic()
    try:
        await infer(body, metadata=metadata, timeout=timeout)
    except grpc.aio.AioRpcError as error:
        result.codes[error.code().name] += 1
        result.first_error = result.first_error or f"{error.code().name}: {error.details()}"
    else:
        result.codes["OK"] += 1
    result.seconds.append(time.monotonic() - began)
