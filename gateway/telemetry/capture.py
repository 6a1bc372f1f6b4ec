"""Telemetry: keeps requests of chosen models for replay, with their payloads. Off unless the config names a model.

May depend on config, fsspec and the V2 message classes. A call only hands its bytes over; a thread redacts, encodes
and writes them. What is kept is bounded: a share of the calls, a size per request, a ring of files per model, and the
bytes that wait for the thread. Of a caller's metadata only the keys that the config names are kept.

A file has one JSON object per line; docs/metrics.md lists its fields, and `replay` reads it.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import queue
import random
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from gateway.config.serving import Capture
from gateway.forwarding.metadata import REPLAYED
from gateway.forwarding.topology import Take
from gateway.hooks import CallStarted
from gateway.telemetry.ring import Ring, RingSettings
from gateway.v2.shapes import ImpossibleShape, elements_of

_log = logging.getLogger(__name__)

_WAITING_BYTES = 64 << 20  # bytes of requests that the thread has not written; further requests are dropped
_IDLE_SECONDS = 1.0  # between two checks whether a file is old enough to be closed
_STOP_SECONDS = 5.0  # for the last writes at the end; an object store that hangs must not hold up a drained process

Job = tuple["_Kept", CallStarted, bytes, datetime]


class Captures:
    """Keeps requests between enter and exit; `apply` chooses the models."""

    def __init__(self, worker: str, draw: Callable[[], float] = random.random) -> None:
        """worker: unique among the processes of this host, for file names. draw: a number in [0, 1)."""
        self._writer = f"{socket.gethostname()}-{os.getpid()}-{worker}"
        self._draw = draw
        self._rings: Mapping[str, _Kept] = {}
        self._jobs: queue.SimpleQueue[Job | _Kept | None] = queue.SimpleQueue()
        self._handed = 0  # bytes given to the thread; only the event loop's thread counts
        self._done = 0  # bytes that the thread has finished; only that thread counts
        self._dropped = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Captures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        """Write what is queued, and close the files."""
        self.apply(())
        if self._thread:
            self._jobs.put(None)
            self._thread.join(_STOP_SECONDS)

    def apply(self, settings: Sequence[Capture]) -> Mapping[str, Take]:
        """Follow new settings. Returns what to call for each model, by the name that callers use."""
        old, self._rings = self._rings, {}
        for each in settings:
            kept = old.get(each.model)
            self._rings[each.model] = kept if kept and kept.settings == each else _Kept(each, self._writer)
        for ring in old.values():
            if ring not in self._rings.values():
                self._jobs.put(ring)
        if self._rings and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
            self._thread.start()
        return {model: self._taker(ring) for model, ring in self._rings.items()}

    def _taker(self, ring: _Kept) -> Take:
        share, most = ring.settings.share, ring.settings.max_bytes

        def take(call: CallStarted, body: bytes) -> None:
            if not body or len(body) > most or REPLAYED in call.facts.metadata:
                return  # a replayed request was captured before, and would go round for ever
            if share < 1 and self._draw() >= share:
                return
            if self._handed - self._done + len(body) > _WAITING_BYTES:
                self._drop()
                return
            self._handed += len(body)
            self._jobs.put((ring, call, body, datetime.now(timezone.utc)))

        return take

    def _drop(self) -> None:
        if self._dropped == 0:
            _log.warning("capture: requests come faster than they can be written; some are left out")
        self._dropped += 1

    def _run(self) -> None:
        rings: set[_Kept] = set()
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                for kept in rings:
                    kept.ring.close_if_old()
                continue
            if job is None:
                break
            if isinstance(job, _Kept):
                job.ring.close()
                rings.discard(job)
                continue
            kept, call, body, at = job
            rings.add(kept)
            kept.write(call, body, at)
            self._done += len(body)
        for kept in rings:
            kept.ring.close()


class _Kept:
    """What is kept of one model."""

    def __init__(self, settings: Capture, writer: str) -> None:
        self.settings = settings
        each = settings
        self.ring = Ring(
            RingSettings("capture", each.model, each.directory, each.file_bytes, each.file_age, each.files), writer
        )

    def write(self, call: CallStarted, body: bytes, at: datetime) -> None:
        line = None if self.ring.is_quiet else _line(self.settings, call, body, at)
        if line is not None:
            self.ring.write(line, at)


def _line(settings: Capture, call: CallStarted, body: bytes, at: datetime) -> bytes | None:
    """One line of a file; None if the request can't be parsed, since then it can't be redacted either."""
    redacted: list[str] = []
    if settings.redact:
        try:
            message = pb.ModelInferRequest.FromString(body)
        except DecodeError:
            return None
        redacted = redact(message, settings.redact)
        body = message.SerializeToString()
    metadata = call.facts.metadata
    fields = {
        "time": at.isoformat(timespec="milliseconds"),
        "method": call.method,
        "model": call.model,
        "request_id": call.request_id,
        "metadata": {key: metadata[key] for key in settings.metadata if key in metadata},
        "redacted": redacted,
        "request": base64.b64encode(body).decode(),
    }
    return json.dumps(fields).encode() + b"\n"


def redact(message: Any, names: Sequence[str]) -> list[str]:
    """Replace the values of these inputs by zeros (or empty texts), and remove parameters of these names.

    Shapes stay, so a redacted request can still be replayed.

    message: a ModelInferRequest (Any: its class carries no types), changed in place.
    returns: the names that were found.
    """
    found = []
    raw_index = 0
    for tensor in message.inputs:
        has_raw = "shared_memory_region" not in tensor.parameters
        if tensor.name in names:
            found.append(tensor.name)
            _clear_typed(tensor.contents)
            if has_raw and raw_index < len(message.raw_input_contents):
                raw = message.raw_input_contents[raw_index]
                message.raw_input_contents[raw_index] = _zeros(tensor, len(raw))
        raw_index += has_raw
    for name in names:
        if name in message.parameters:
            found.append(name)
            del message.parameters[name]
    return found


def _zeros(tensor: Any, size: int) -> bytes:
    """Raw contents of as many elements: zeros, or texts that are empty, each with its length in four bytes."""
    if tensor.datatype != "BYTES":
        return bytes(size)
    try:
        elements = elements_of(tensor.shape)
    except ImpossibleShape:
        elements = size
    return bytes(4 * min(elements, size // 4))  # no more than arrived, whatever the shape claims


def _clear_typed(contents: Any) -> None:
    for _, values in contents.ListFields():
        empty = [type(value)() for value in values]
        del values[:]
        values.extend(empty)
